import Accelerator
import Glibc
import GuestMemory
import Host
import TestSupport
import Testing

@testable import KVM

@Suite struct CPUIDTests {
    private func table(_ edx: UInt32, _ ebx: UInt32 = 0) -> CPUID {
        CPUID(entries: [
            .init(function: 1, index: 0, flags: 0, eax: 0x806f8, ebx: 0, ecx: 0, edx: edx),
            .init(function: 7, index: 0, flags: 1, eax: 2, ebx: ebx, ecx: 0, edx: 0),
        ])
    }

    @Test("a feature that the host lacks is named by leaf, register and bits; models and addresses do not count")
    func missing() {
        #expect(table(0b111, 0xff).firstMissing(from: table(0b101, 0x0f)) == nil)
        #expect(table(0b101).firstMissing(from: table(0b111)) == "leaf 0x1 edx bits 0x2")
        #expect(table(0, 1).firstMissing(from: table(0, 0x81)) == "leaf 0x7 ebx bits 0x80")
        #expect(CPUID(entries: []).firstMissing(from: table(1)) == "leaf 0x1 edx bits 0x1")
        var other = table(1)
        other.entries[0].eax = 0xffff_ffff
        other.entries[0].ebx = 0xffff_ffff
        #expect(table(1).firstMissing(from: other) == nil)
    }

    @Test("each vCPU sees its own APIC id and how many there are", arguments: [(0, 1), (1, 2), (63, 64)])
    func topology(number: Int, count: Int) {
        let leaf = table(0).forCPU(number, of: count).entries[0]
        #expect(leaf.ebx >> 24 == UInt32(number))
        #expect(leaf.ebx >> 16 & 0xff == UInt32(count))
        #expect(leaf.ecx >> 31 == 1)
    }
}

@Suite struct PartListTests {
    @Test("parts come back as they were written, in any order")
    func roundTrip() throws {
        var list = PartList()
        list.append(2, [1, 2, 3])
        list.append(1, [])
        #expect(try PartList.parse(list.bytes, of: "test", expecting: [1, 2]) == [1: [], 2: [1, 2, 3]])
    }

    @Test("a part that is unknown, double, missing or cut off is refused by section and number")
    func refusals() {
        func refusal(_ bytes: [UInt8]) -> String {
            do { return "\(try PartList.parse(bytes, of: "test", expecting: [1, 2]))" } catch {
                return error.description
            }
        }
        let (one, two) = ([0, 1, 0, 0, 0, 1, 9] as [UInt8], [0, 2, 0, 0, 0, 0] as [UInt8])
        #expect(refusal(one) == "section test: part 2 is missing")
        #expect(refusal(one + one + two) == "section test: part 1 comes twice")
        #expect(refusal([0, 7, 0, 0, 0, 0]) == "section test: part 7 is not known")
        for length in 1..<13 where length != 7 {
            #expect(
                refusal(Array((one + two).prefix(length)))
                    == "section test: the body of \(length) bytes ends inside a part")
        }
        #expect(refusal([0, 1, 0xff, 0xff, 0xff, 0xff, 0]) == "section test: the body of 7 bytes ends inside a part")
    }

    @Test("random bytes are refused or read, and never trap")
    func fuzz() {
        var random = SeededRandom(seed: 17)
        for _ in 0..<2000 {
            let bytes = (0..<Int.random(in: 0..<64, using: &random)).map { _ in
                UInt8.random(in: 0...(Bool.random(using: &random) ? 3 : 255), using: &random)
            }
            _ = try? PartList.parse(bytes, of: "test", expecting: [0, 1, 2])
        }
    }
}

@Suite("KVM machine", .enabled(if: unsafe access("/dev/kvm", R_OK | W_OK) == 0, "this machine has no /dev/kvm to open"))
struct KVMMachineTests {
    private func memory(_ byteCount: UInt64) throws -> GuestMemory {
        let block = try RAMBlock(name: "ram", byteCount: byteCount, backing: .memfd)
        return GuestMemory(
            blocks: [block],
            view: FlatView([
                FlatRange(
                    guestAddress: GuestPhysicalAddress(0), byteCount: byteCount, block: block, offset: RAMOffset(0))
            ]))
    }

    @Test("guest memory of any size is cut into few slots that cover it exactly")
    func slots() throws {
        for size in [1 << 20, 64 << 30, (64 << 30) + 4096, 512 << 30] as [UInt64] {
            let memory = try memory(size)
            let machine = try KVMSystem().makeMachine()
            let slots = try KVMSlots(machine: machine, memory: memory, limit: 509).slots
            #expect(slots.count <= 34)
            #expect(slots.first?.pieces[0].blockPages.lowerBound == PageIndex(0))
            #expect(slots.last?.pieces[0].blockPages.upperBound == PageIndex(size / 4096))
            for (one, next) in zip(slots, slots.dropFirst()) {
                #expect(one.pieces[0].blockPages.upperBound == next.pieces[0].blockPages.lowerBound)
                #expect(one.guestAddress + one.pageCount * 4096 == next.guestAddress)
                #expect(next.pieces[0].blockPages.lowerBound.value % 64 == 0)
            }
        }
    }

    @Test("what may be a page table is told from what cannot be one, without touching holes")
    func tables() throws {
        let memory = try memory(64 << 20)
        let slots = try KVMSlots(
            machine: KVMSystem().makeMachine(), memory: memory, limit: 509, shadowPaging: .longMode)
        let block = memory.blocks[0]
        func mayHold(_ pages: Range<UInt64>, readOnly: Bool = false) -> Bool {
            slots.mayHoldTables([
                ShownPages(
                    pages: 0..<UInt64(pages.count),
                    content: .init(block: 0, firstPage: PageIndex(pages.lowerBound), isReadOnly: readOnly))
            ])
        }
        #expect(!mayHold(0..<16384))
        #expect(try !block.isAllocated(in: block.pages))
        // Text; an entry that points nowhere; one that nobody has used, which a table in read-only memory may be for all that.
        block.mapping.write(Array("a page of text, aligned as it likes.....".utf8), at: 4096)
        block.mapping.store(UInt64(0x7fff_ffff_f067), at: 8192)
        block.mapping.store(UInt64(0x3f_f003), at: 12288)
        #expect(!mayHold(0..<16384))
        #expect(mayHold(3..<4, readOnly: true) && !mayHold(0..<2, readOnly: true))
        block.mapping.store(UInt64(0x8000_0000_003f_f023), at: 20480 - 8)
        #expect(mayHold(0..<5) && mayHold(4..<5) && !mayHold(0..<4) && !mayHold(5..<16384))
        let any = try KVMSlots(machine: KVMSystem().makeMachine(), memory: memory, limit: 509, shadowPaging: .anyMode)
        let narrow = ShownPages(pages: 0..<1, content: .init(block: 0, firstPage: PageIndex(6), isReadOnly: false))
        #expect(!any.mayHoldTables([narrow]))
        block.mapping.store(UInt64(0xffff_f023_0000_0000), at: 24576)
        #expect(any.mayHoldTables([narrow]) && !slots.mayHoldTables([narrow]))
    }

    @Test("more memory than there are slots for is refused with a remedy")
    func tooManySlots() throws {
        let memory = try memory(512 << 30)
        let machine = try KVMSystem().makeMachine()
        let error = #expect(throws: AcceleratorError.self) { try KVMSlots(machine: machine, memory: memory, limit: 2) }
        #expect(error?.description.contains("memory slots, but this kernel's KVM has 2; use less memory") == true)
    }

    @Test("what a vCPU saves it loads again, to the byte where nothing runs on")
    func registers() throws {
        let accelerator = try KVMAccelerator(memory: try memory(1 << 20), cpuCount: 2)
        let cpu = accelerator.cpus[1]
        try cpu.reset(to: .protected32(entry: 0x1234, ebx: 0x5678))
        var registers = try cpu.registers()
        registers.r15 = 0xdead_beef_0123_4567
        try cpu.setRegisters(registers)
        let other = try KVMAccelerator(memory: try memory(1 << 20), cpuCount: 2).cpus[1]
        try other.load(try cpu.save(), clock: .none)
        #expect(try other.registers() == registers)
        #expect(registers.rip == 0x1234 && registers.rbx == 0x5678)
        try other.reset(to: .real(cs: 0, ip: 0x7c00, sp: 0x7000, dl: 0x80))
        #expect(try other.registers().r15 == 0)
        #expect(try other.registers().rdx == 0x80)
    }

    @Test("a machine that nobody holds any more gives back its slots and vCPUs")
    func lifetime() throws {
        weak var slots: KVMSlots?
        weak var cpu: KVMVirtualCPU?
        do {
            let accelerator = try KVMAccelerator(memory: try memory(1 << 20), cpuCount: 2)
            slots = accelerator.slots
            cpu = accelerator.cpus[1] as? KVMVirtualCPU
            #expect(slots != nil && cpu != nil)
        }
        #expect(slots == nil && cpu == nil)
    }

    @Test("tracking that is not on is refused, not answered with nothing")
    func notStarted() throws {
        let memory = try memory(1 << 20)
        let tracker = try KVMAccelerator(memory: memory, cpuCount: 1).dirtyTracker(for: .migration)
        let bitmap = try DirtyBitmap(pageCount: 256)
        #expect(throws: AcceleratorError.self) { try tracker.collect(into: [bitmap]) }
        try tracker.start()
        memory.blocks[0].mapping.store(UInt8(1), at: 8192)
        try tracker.collect(into: [bitmap])
        #expect(bitmap.count == 1 && bitmap.contains(PageIndex(2)))
        tracker.stop()
        tracker.stop()
        #expect(throws: AcceleratorError.self) { try tracker.collect(into: [bitmap]) }
    }
}
