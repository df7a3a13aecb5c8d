/// Why a file cannot be booted; its description is one sentence that names the file.
public enum BootError: Error, Equatable, CustomStringConvertible {
    /// The boot-sector image has no bytes.
    case emptyImage(file: String)
    /// The boot-sector image does not fit below the BIOS.
    case imageTooLarge(file: String, bytes: UInt64, limit: UInt64)
    /// The kernel cannot be booted by the PVH protocol.
    case kernel(file: String, KernelFault)

    public var description: String {
        switch self {
        case .emptyImage(let file): "boot sector \(file): the file is empty"
        case .imageTooLarge(let file, let bytes, let limit):
            "boot sector \(file): \(bytes) bytes are more than the limit of \(limit) bytes (\(limit >> 10) KiB)"
        case .kernel(let file, let fault): "kernel \(file): \(fault)"
        }
    }
}

/// What is wrong with a kernel file.
public enum KernelFault: Error, Equatable, Sendable, CustomStringConvertible {
    /// The file is longer than what the loader reads.
    case tooLarge(bytes: UInt64, limit: UInt64)
    /// The file does not begin as an ELF file does.
    case notELF
    /// The file is ELF, but of a kind that this machine does not run.
    case unsupported(String)
    /// The named part lies outside the file.
    case outsideFile(String)
    /// The named part is larger than any kernel needs.
    case excessive(String, limit: Int)
    /// No program header says what to load.
    case nothingToLoad
    /// A segment holds more bytes in the file than in memory.
    case fileSizeAboveMemorySize(segment: Int)
    /// A segment lies outside the guest's RAM.
    case outsideRAM(segment: Int, address: UInt64, bytes: UInt64)
    /// A segment lies on the start info that the kernel is given.
    case onStartInfo(segment: Int, address: UInt64)
    /// Two segments share memory.
    case overlap(Int, Int)
    /// There is no note that names the PVH entry point.
    case noEntryNote
    /// The entry point is not 4 or 8 bytes long.
    case entryNoteLength(UInt32)
    /// The entry point is in no loaded segment.
    case entryOutside(UInt64)
    /// The command line does not fit in its place.
    case commandLineTooLong(bytes: Int, limit: Int)

    public var description: String {
        switch self {
        case .tooLarge(let bytes, let limit): "\(bytes) bytes are more than the limit of \(limit) bytes"
        case .notELF: "not an ELF file; give a flat ELF kernel with a PVH entry note"
        case .unsupported(let what): "\(what); give an executable for x86 or x86-64"
        case .outsideFile(let part): "\(part) lies outside the file; the file is truncated or damaged"
        case .excessive(let part, let limit): "\(part) exceeds the limit of \(limit)"
        case .nothingToLoad: "no PT_LOAD program header, so nothing to load"
        case .fileSizeAboveMemorySize(let segment):
            "segment \(segment) has more bytes in the file than in memory; the file is damaged"
        case .outsideRAM(let segment, let address, let bytes):
            "segment \(segment) (\(bytes) bytes at physical address \(hexadecimal(address))) does not fit in the guest's RAM; "
                + "give the guest more memory or link the kernel lower"
        case .onStartInfo(let segment, let address):
            "segment \(segment) at physical address \(hexadecimal(address)) covers the PVH start info at "
                + "\(hexadecimal(PVHStartInfo.range.lowerBound)) to \(hexadecimal(PVHStartInfo.range.upperBound)); "
                + "link the kernel higher"
        case .overlap(let first, let second): "segments \(first) and \(second) overlap in physical memory"
        case .noEntryNote:
            "no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY); build it with one (Linux: CONFIG_PVH=y, uncompressed vmlinux)"
        case .entryNoteLength(let bytes): "the PVH entry note holds \(bytes) bytes instead of 4 or 8"
        case .entryOutside(let address): "the PVH entry point \(hexadecimal(address)) is in no loaded segment"
        case .commandLineTooLong(let bytes, let limit):
            "the kernel command line has \(bytes) bytes, more than the limit of \(limit)"
        }
    }
}

/// A number as the sentences of this folder print addresses.
func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
