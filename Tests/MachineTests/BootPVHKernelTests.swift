import Devices
import Host
import Machine
import TestSupport
import Testing

private typealias Segment = ELFBuilder.Segment

@Suite("PVH kernel")
struct BootPVHKernelTests {
    private let ram: RAMLayout

    init() throws {
        ram = try RAMLayout(byteCount: 64 << 20, physicalAddressBits: 40)
    }

    private func load(_ builder: ELFBuilder, commandLine: String = "") throws(BootError) -> BootPlan {
        try PVHKernel(file: "vmlinux", contents: builder.file, commandLine: commandLine, ram: ram).plan
    }

    private func fault(_ builder: ELFBuilder) -> KernelFault? { fault(builder.file) }

    private func fault(_ contents: [UInt8], commandLine: String = "") -> KernelFault? {
        do {
            _ = try PVHKernel(file: "vmlinux", contents: contents, commandLine: commandLine, ram: ram)
            return nil
        } catch .kernel(let file, let fault) {
            #expect(file == "vmlinux")
            return fault
        } catch {
            Issue.record("\(error) is no fault of a kernel")
            return nil
        }
    }

    @Test(
        "a kernel is loaded at its physical addresses, with zeros after its bytes, and entered at its note's address",
        arguments: [(true, true), (true, false), (false, true), (false, false)])
    func loads(is64Bit: Bool, noteInSection: Bool) throws {
        let plan = try load(.kernel(is64Bit: is64Bit, noteInSection: noteInSection))
        #expect(plan.cpu == .protected32(entry: 0x100010, ebx: 0x1000))
        let code = try #require(plan.segments.first { $0.address == 0x100000 })
        #expect(code.bytes.elementsEqual(Array(0..<64)))
        #expect(code.byteCount == 0x3000)
        #expect(plan.bootDiskImage.isEmpty)
    }

    @Test("an entry note of 8 bytes is good, and other notes before it are passed over")
    func eightByteNote() throws {
        var builder = ELFBuilder.kernel()
        let others = [
            ELFBuilder.note(owner: "GNU", descriptor: [1, 2, 3, 4]),
            ELFBuilder.note(type: 5, descriptor: Array("linux".utf8)),
            ELFBuilder.note(owner: "", descriptor: [1, 2, 3]),
        ]
        builder.segments[1].bytes =
            others.flatMap(\.self) + ELFBuilder.note(descriptor: ELFBuilder.integer(0x102000, 8))
        #expect(try load(builder).cpu == .protected32(entry: 0x102000, ebx: 0x1000))
    }

    @Test("notes in a segment aligned to 8 bytes are padded to 8 bytes")
    func alignedNotes() throws {
        var builder = ELFBuilder.kernel()
        let other = ELFBuilder.note(owner: "GNU", descriptor: [1, 2, 3, 4])
        builder.segments[1].bytes = other + [0, 0, 0, 0] + builder.segments[1].bytes
        #expect(fault(builder) == .noEntryNote)
        builder.segments[1].alignment = 8
        #expect(try load(builder).cpu == .protected32(entry: 0x100010, ebx: 0x1000))
    }

    @Test("the start info holds the memory map and the command line at their fixed places")
    func startInfo() throws {
        let plan = try load(.kernel(), commandLine: "console=ttyS0 é")
        var memory = [UInt8](repeating: 0xee, count: 0x4000)
        for segment in plan.segments where segment.address < 0x4000 {
            let start = Int(segment.address)
            memory.replaceSubrange(start..<start + segment.bytes.count, with: segment.bytes)
            for index in segment.bytes.count..<max(segment.bytes.count, Int(segment.byteCount)) {
                memory[start + index] = 0
            }
        }
        func integer(_ address: Int, _ bytes: Int) -> UInt64 {
            memory[address..<address + bytes].reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
        #expect(integer(0x1000, 4) == 0x336e_c578)
        #expect(integer(0x1004, 4) == 1)
        #expect([integer(0x1008, 4), integer(0x100c, 4), integer(0x1010, 8), integer(0x1020, 8)] == [0, 0, 0, 0])
        let commandLine = Int(integer(0x1018, 8))
        #expect(memory[commandLine...].prefix { $0 != 0 }.elementsEqual("console=ttyS0 é".utf8))
        let map = Int(integer(0x1028, 8))
        #expect(integer(0x1030, 4) == UInt64(ram.e820.count))
        for (index, entry) in ram.e820.enumerated() {
            #expect(integer(map + 24 * index, 8) == entry.base)
            #expect(integer(map + 24 * index + 8, 8) == entry.length)
            #expect(integer(map + 24 * index + 16, 4) == UInt64(entry.kind.rawValue))
            #expect(integer(map + 24 * index + 20, 4) == 0)
        }
    }

    @Test("segments of a plan ascend without overlap, with the longest command line and memory on both sides of 4 GiB")
    func disjoint() throws {
        let ram = try RAMLayout(byteCount: 8 << 30, physicalAddressBits: 40)
        var builder = ELFBuilder.kernel()
        builder.segments.append(Segment(address: 0x3000, bytes: [1]))
        builder.segments.append(Segment(address: 0xff0, bytes: Array(0..<16)))
        builder.segments.append(Segment(address: 0x1_0000_0000, bytes: [1], memoryBytes: 5 << 30))
        let text = String(repeating: "x", count: PVHKernel.maximumCommandLineBytes)
        let plan = try PVHKernel(file: "k", contents: builder.file, commandLine: text, ram: ram).plan
        for (lower, upper) in zip(plan.segments, plan.segments.dropFirst()) {
            #expect(lower.address + lower.byteCount <= upper.address)
        }
        #expect(plan.segments.count == 7)
    }

    @Test("a file without the entry note is refused with the remedy")
    func noNote() {
        var builder = ELFBuilder.kernel()
        builder.segments[1].bytes = ELFBuilder.note(type: 17, descriptor: [0, 0, 0x10, 0])
        #expect(fault(builder) == .noEntryNote)
        builder.segments[1].bytes = ELFBuilder.note(owner: "Yen", descriptor: [0, 0, 0x10, 0])
        #expect(fault(builder) == .noEntryNote)
        builder.segments.removeLast()
        #expect(fault(builder) == .noEntryNote)
        #expect(
            BootError.kernel(file: "bzImage", .noEntryNote).description
                == "kernel bzImage: no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY); build it with one "
                + "(Linux: CONFIG_PVH=y, uncompressed vmlinux)")
    }

    @Test(
        "an entry point outside what is loaded is refused", arguments: [0, 0xfffff, 0x103000, 0xffff_ffff] as [UInt64])
    func entryOutside(entry: UInt64) {
        #expect(fault(.kernel(entry: entry)) == .entryOutside(entry))
    }

    @Test("an entry point that 32 bits do not hold, or of another length, is refused")
    func entryWidth() {
        var builder = ELFBuilder.kernel()
        builder.segments[1].bytes = ELFBuilder.note(descriptor: ELFBuilder.integer(0x1_0010_0000, 8))
        #expect(fault(builder) == .entryOutside(0x1_0010_0000))
        builder.segments[1].bytes = ELFBuilder.note(descriptor: [0, 0, 0x10])
        #expect(fault(builder) == .entryNoteLength(3))
    }

    @Test(
        "a segment outside RAM is refused, wherever it overflows",
        arguments: [
            (64 << 20, 1), ((64 << 20) - 1, 2), (0x100000, .max), (.max, 1), (.max, .max), (0x1_0000_0000, 1),
            (0, (64 << 20) + 1),
        ] as [(UInt64, UInt64)])
    func outsideRAM(address: UInt64, bytes: UInt64) {
        var builder = ELFBuilder.kernel()
        builder.segments[0] = Segment(address: address, bytes: [0], memoryBytes: bytes)
        #expect(fault(builder) == .outsideRAM(segment: 0, address: address, bytes: bytes))
    }

    @Test("a segment on the start info is refused", arguments: [0xfff, 0x1000, 0x2fff] as [UInt64])
    func onStartInfo(address: UInt64) {
        var builder = ELFBuilder.kernel()
        builder.segments.append(Segment(address: address, bytes: [1, 2]))
        #expect(fault(builder) == .onStartInfo(segment: 2, address: address))
    }

    @Test("overlapping segments are refused, in whatever order the file has them")
    func overlap() {
        var builder = ELFBuilder.kernel()
        builder.segments.append(Segment(address: 0xff000, bytes: [1], memoryBytes: 0x1001))
        #expect(fault(builder) == .overlap(0, 2))
        builder.segments[2] = Segment(address: 0x102fff, bytes: [1])
        #expect(fault(builder) == .overlap(0, 2))
        builder.segments[2] = Segment(address: 0x103000, bytes: [1])
        #expect(fault(builder) == nil)
    }

    @Test("files that are no executable for x86 are refused by kind")
    func kinds() {
        #expect(fault([]) == .notELF)
        #expect(fault(Array("\u{7f}ELF".utf8)) == .notELF)
        #expect(fault([UInt8](repeating: 0x90, count: 4096)) == .notELF)
        var builder = ELFBuilder.kernel()
        builder.machine = 183
        #expect(fault(builder) == .unsupported("ELF file for machine 183"))
        builder.machine = 62
        builder.type = 1
        #expect(fault(builder) == .unsupported("ELF file of type 1, not an executable"))
        var file = ELFBuilder.kernel().file
        file[4] = 3
        #expect(fault(file) == .unsupported("ELF class 3"))
        file[4] = 2
        file[5] = 2
        #expect(fault(file) == .unsupported("ELF file that is not little-endian"))
    }

    @Test("more bytes in the file than in memory, nothing to load, and too long a command line are refused")
    func odd() {
        var builder = ELFBuilder.kernel()
        builder.segments[0].memoryBytes = 63
        #expect(fault(builder) == .fileSizeAboveMemorySize(segment: 0))
        builder.segments.removeFirst()
        #expect(fault(builder) == .nothingToLoad)
        let limit = PVHKernel.maximumCommandLineBytes
        let text = String(repeating: "x", count: limit + 1)
        #expect(
            fault(ELFBuilder.kernel().file, commandLine: text) == .commandLineTooLong(bytes: limit + 1, limit: limit))
    }

    @Test("too many program headers and too many notes are refused before they cost time")
    func excessive() {
        var builder = ELFBuilder.kernel()
        builder.segments = (0..<257).map { Segment(address: 0x100000 + $0, bytes: [1]) }
        #expect(fault(builder) == .excessive("the number of program headers (257)", limit: 256))
        builder = .kernel()
        builder.segments[1].bytes = [UInt8](repeating: 0, count: (1 << 20) + 1)
        #expect(fault(builder) == .excessive("the length of the notes", limit: 1 << 20))
        builder.segments[1].bytes = [UInt8](repeating: 0, count: 600 << 10)
        builder.segments.append(builder.segments[1])
        #expect(fault(builder) == .excessive("the length of the notes", limit: 1 << 20))
    }

    @Test("a file larger than the limit is refused before it is read")
    func fileLimit() throws {
        try PVHKernel.checkLength(PVHKernel.maximumFileBytes, file: "k")
        #expect(throws: BootError.self) { try PVHKernel.checkLength(PVHKernel.maximumFileBytes + 1, file: "k") }
    }

    @Test(
        "a sound file cut at any byte is refused",
        arguments: [(true, true), (true, false), (false, true), (false, false)])
    func truncated(is64Bit: Bool, noteInSection: Bool) {
        let file = ELFBuilder.kernel(is64Bit: is64Bit, noteInSection: noteInSection).file
        #expect(fault(file) == nil)
        for count in 0..<file.count {
            #expect(fault(Array(file.prefix(count))) != nil, "cut at \(count)")
        }
    }

    @Test("a file with random damage gives a plan within RAM or an error")
    func randomDamage() throws {
        let seed: UInt64 = 0xe1f
        var random = SeededRandom(seed: seed)
        let files = [(true, true), (true, false), (false, true), (false, false)].map {
            ELFBuilder.kernel(is64Bit: $0.0, noteInSection: $0.1).file
        }
        let interesting: [UInt8] = [0x00, 0x01, 0x7f, 0x80, 0xfe, 0xff]
        var plans = 0
        for round in 0..<40_000 {
            var file = files.randomElement(using: &random)!
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                let position = Int.random(in: file.indices, using: &random)
                let value = Bool.random(using: &random) ? interesting.randomElement(using: &random)! : 0
                let count = [1, 4, 8].randomElement(using: &random)!
                for index in position..<min(position + count, file.count) { file[index] = value ^ UInt8(index & 1) }
            }
            guard let plan = try? PVHKernel(file: "damaged", contents: file, ram: ram).plan else { continue }
            plans += 1
            for segment in plan.segments {
                #expect(
                    ram.contains(address: segment.address, count: segment.byteCount), "seed \(seed) round \(round)")
            }
        }
        #expect(plans > 0)
    }

    @Test(
        "a kernel made by the system's assembler and linker boots at its symbol",
        .enabled(if: hasAssembler, "needs as and ld"))
    func assembled() throws {
        let file = try shell(
            """
            folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder" && cat > pvh.s <<'END' &&
            .code32
            .section .note.pvh, "a", @note
            .long 4, 4, 18
            .asciz "Xen"
            .long pvh
            .text
            .fill 100, 1, 0x90
            .globl pvh
            pvh: cli
            1: hlt
            jmp 1b
            .lcomm area, 0x5000
            END
            as --64 -o pvh.o pvh.s &&
            ld -m elf_x86_64 -z max-page-size=4096 -Ttext-segment=0x100000 -e pvh -o pvh.elf pvh.o && cat pvh.elf
            """)
        let plan = try PVHKernel(file: "pvh.elf", contents: file, ram: ram).plan
        // The linker was told to make the same symbol the ELF header's entry.
        let entry = file[24..<28].reversed().reduce(0) { $0 << 8 | UInt32($1) }
        #expect(plan.cpu == .protected32(entry: entry, ebx: 0x1000))
        let code = try #require(
            plan.segments.first { $0.address <= entry && UInt64(entry) - $0.address < $0.bytes.count })
        #expect(code.bytes.dropFirst(Int(entry) - Int(code.address)).prefix(4).elementsEqual([0xfa, 0xf4, 0xeb, 0xfd]))
    }
}

private let hasAssembler = (try? shell("command -v as && command -v ld"))?.isEmpty == false

/// Runs a script and returns what it printed; a script that fails printed nothing.
private func shell(_ script: String) throws -> [UInt8] {
    func start() throws -> (child: ChildProcess, output: Descriptor) {
        // Our write end goes with this function, so that reading ends when the child does.
        let pipe = try Descriptor.pipe()
        return (try ChildProcess(["/bin/sh", "-c", script], output: pipe.write), pipe.read)
    }
    let (child, output) = try start()
    let printed = try output.readAll()
    return child.wait(deadline: .after(seconds: 30))?.isSuccess == true ? printed : []
}
