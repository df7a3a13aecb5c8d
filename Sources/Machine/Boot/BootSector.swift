import Devices

/// Boots an image file the way a PC boots a disk, except that the whole image is in memory from the start.
///
/// The image is loaded at 0x7c00 and entered there in real mode with DL=80h. The BIOS stubs, the interrupt vectors and
/// the BIOS data area are in place, and drive 80h holds the image, for a boot sector that loads the rest of itself.
/// No signature is asked for.
public struct BootSector: Equatable, Sendable {
    /// Where the image is loaded and entered.
    public static let loadAddress: UInt64 = 0x7c00
    /// The longest image: 480 KiB, which end at 0x7fc00, below the BIOS's part of conventional memory.
    public static let maximumBytes = UInt64(BootDisk.maximumBytes)
    /// The top of the stack that the image starts with.
    public static let stackTop: UInt16 = 0x7000
    /// The BIOS number of the drive that holds the image.
    public static let drive: UInt8 = 0x80

    /// The image as it is in the file.
    public let image: [UInt8]

    /// Takes the contents of `file`.
    ///
    /// - Throws: `BootError` when the image is empty or too large.
    public init(file: String, image: [UInt8]) throws(BootError) {
        try Self.checkLength(UInt64(image.count), file: file)
        self.image = image
    }

    /// Checks a file's length before its contents are read.
    ///
    /// - Throws: `BootError` when the image is empty or too large.
    public static func checkLength(_ byteCount: UInt64, file: String) throws(BootError) {
        guard byteCount > 0 else { throw .emptyImage(file: file) }
        guard byteCount <= maximumBytes else {
            throw .imageTooLarge(file: file, bytes: byteCount, limit: maximumBytes)
        }
    }

    /// The plan; it fits in every RAM layout.
    public var plan: BootPlan {
        BootPlan(
            segments: [
                .init(address: BIOSImage.vectorTableAddress, bytes: BIOSImage.vectorTable[...]),
                .init(address: BIOSImage.dataAreaAddress, bytes: BIOSImage.dataArea(hardDisks: 1)[...]),
                .init(address: Self.loadAddress, bytes: image[...]),
                .init(address: BIOSImage.romAddress, bytes: BIOSImage.rom[...]),
            ],
            cpu: .real16(cs: 0, ip: UInt16(Self.loadAddress), sp: Self.stackTop, dl: Self.drive),
            bootDiskImage: image)
    }
}
