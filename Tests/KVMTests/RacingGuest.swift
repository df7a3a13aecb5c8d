import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization
import TestSupport
import Testing

@testable import KVM

/// vCPUs on the processor itself, in 64-bit user mode with page tables of their own, which read, call, write and walk page tables in a
/// range of guest addresses, the arena, while its layout changes.
///
/// Blocks: 0 holds programs, results and page tables, from address 0 on. 1 and 2 have a file, 3 has none: every page of them begins with
/// its index, and has code behind that returns it. Whatever the arena shows, page i of it is page i of one of them, or nothing.
final class RacingGuest: Bus, @unchecked Sendable {
    static let arena: UInt64 = 4 << 20
    static let arenaPages = 1024
    /// Where a page table of the arena itself, its page `tablePage`, shows pages of block 0 that begin with their index.
    static let walked: UInt64 = (1 << 30) + 8 * 4096
    static let tablePage = 512
    static let walkedPages = 64

    let memory: GuestMemory
    let slots: KVMSlots
    private let machine: Descriptor
    private let system: KVMSystem
    /// Held over a commit, so that a vCPU which came out meanwhile is answered by what the commit made of it.
    private let view: Mutex<FlatView>
    private let failures = Monitor<[String]>([])
    private let isOver = Atomic<Bool>(false)
    /// Called on a vCPU's thread which wrote behind the arena. Set before there are such.
    private let whenWritten = Mutex<(@Sendable () -> Void)?>(nil)
    private(set) var cpus: [(cpu: KVMVirtualCPU, thread: HostThread)] = []

    enum Work { case read, call, walk, write, spin }

    init(
        _ work: [Work], showing pieces: [(pages: Range<Int>, block: Int, isReadOnly: Bool)],
        strategy: SlotStrategy = .atomic, limit: Int = 500, observer: ((Descriptor) -> any SlotObserver)? = nil,
        writeRange: Range<Int> = 0..<RacingGuest.arenaPages, shadowPaging: ShadowPaging? = nil
    ) throws {
        try HostThread.installInterruptSignal()
        let low = try RAMBlock(name: "low", byteCount: 2 << 20)
        let size = UInt64(Self.arenaPages + 64) * 4096
        let blocks = try [
            low, RAMBlock(name: "one", byteCount: size, backing: .memfd),
            RAMBlock(name: "two", byteCount: size, backing: .memfd), RAMBlock(name: "three", byteCount: size),
        ]
        let first = Self.view(pieces, blocks)
        memory = GuestMemory(blocks: blocks, view: first)
        view = Mutex(first)
        system = try KVMSystem()
        machine = try system.makeMachine()
        slots = try KVMSlots(
            machine: machine, memory: memory, limit: limit, strategy: strategy,
            shadowPaging: shadowPaging ?? system.shadowPaging)
        try KVMAccelerator.addInterruptControllers(to: machine)
        if let observer {
            slots.setObserver(observer(machine))
            for slot in slots.slots { try slots.set(slot, logging: true) }
        }
        fill()
        let cpuid = try system.supportedCPUID()
        for (index, work) in work.enumerated() {
            try start(index, work, cpuid, work == .write ? writeRange : 0..<Self.arenaPages)
        }
    }

    static func view(
        _ pieces: [(pages: Range<Int>, block: Int, isReadOnly: Bool)], _ blocks: [RAMBlock]
    ) -> FlatView {
        func range(_ address: UInt64, _ pages: Range<Int>, _ block: Int, _ isReadOnly: Bool) -> FlatRange {
            FlatRange(
                guestAddress: GuestPhysicalAddress(address), byteCount: UInt64(pages.count) * 4096,
                block: blocks[block], offset: RAMOffset(UInt64(pages.lowerBound) * 4096), isReadOnly: isReadOnly)
        }
        return FlatView(
            [range(0, 0..<512, 0, false)]
                + pieces.map { range(arena + UInt64($0.pages.lowerBound) * 4096, $0.pages, $0.block, $0.isReadOnly) })
    }

    private func fill() {
        let low = memory.blocks[0].mapping
        low.write(GuestCode.program, at: 0x1000)
        // Page tables: addresses below 10 MiB show themselves; from 1 GiB on it is what the arena's table says.
        low.store(UInt64(0x11067), at: 0x10000)
        low.store(UInt64(0x12067), at: 0x11000)
        low.store(UInt64(0x13067), at: 0x11008)
        for table in 0..<5 {
            low.store(UInt64(0x14067 + table * 0x1000), at: 0x12000 + table * 8)
            for entry in 0..<512 {
                low.store(UInt64((table * 512 + entry) << 12 | 0x67), at: 0x14000 + table * 0x1000 + entry * 8)
            }
        }
        low.store(Self.arena + UInt64(Self.tablePage * 4096) | 0x67, at: 0x13000)
        for page in 0..<Self.walkedPages * 2 { low.store(UInt64(page % Self.walkedPages), at: 0x100000 + page * 4096) }
        for block in 1...3 {
            let mapping = memory.blocks[block].mapping
            for page in 0..<Self.arenaPages {
                mapping.store(UInt64(page), at: page * 4096)
                mapping.store(UInt8(0xb8), at: page * 4096 + 16)
                mapping.store(UInt32(page), at: page * 4096 + 17)
                mapping.store(UInt8(0xc3), at: page * 4096 + 21)
            }
            // The table shows other copies of the walked pages in each block.
            for page in 0..<Self.walkedPages {
                let target = 0x100000 + (block % 2 * Self.walkedPages + page) * 4096
                mapping.store(UInt64(target | 0x67), at: Self.tablePage * 4096 + (8 + page) * 8)
            }
        }
    }

    private func start(_ index: Int, _ work: Work, _ cpuid: CPUID, _ range: Range<Int>) throws {
        let cpu = try KVMVirtualCPU(
            index: index, machine: machine, slots: slots, runByteCount: system.runByteCount, cpuid: cpuid,
            msrs: system.msrIndices())
        slots.hold.add(cpu)
        try GuestCode.enterUserMode(cpu)
        var registers = try cpu.registers()
        registers.rip = 0x1000 + (work == .write ? GuestCode.writer : 0)
        registers.rbx = 0x8000 + UInt64(index) * 64
        registers.r12 = work == .walk ? Self.walked : Self.arena + UInt64(range.lowerBound) * 4096
        if work == .spin { registers.r12 = 0x100000 }
        registers.r13 = work == .spin ? 1 : work == .walk ? UInt64(Self.walkedPages) : UInt64(range.count)
        registers.r14 = work == .call ? 1 : 0
        try cpu.setRegisters(registers)
        let thread = try HostThread(name: "vcpu\(index)") { [self] in
            while !isOver.load(ordering: .acquiring) {
                cpu.clearKick()
                if isOver.load(ordering: .acquiring) { break }
                switch cpu.run(self) {
                case .handled, .interrupted: continue
                case let reason:
                    failures.withLock { $0.append("vcpu\(index), \(work): \(reason)") }
                    return
                }
            }
        }
        cpus.append((cpu, thread))
    }

    func stop() {
        isOver.store(true, ordering: .sequentiallyConsistent)
        for (cpu, thread) in cpus {
            cpu.kick()
            thread.join()
        }
    }

    /// What went wrong so far: vCPUs that ended, and values that no layout shows.
    var failed: [String] {
        let low = memory.blocks[0].mapping
        return failures.withLock { $0 }
            + cpus.indices.compactMap { index in
                let value = low.load(at: 0x8000 + index * 64 + 8, as: UInt64.self)
                let place = low.load(at: 0x8000 + index * 64 + 16, as: UInt64.self)
                return place == 0 ? nil : "vcpu\(index) found \(value) at 0x\(String(place, radix: 16))"
            }
    }

    /// Passes over its range that each vCPU has made.
    var passes: [UInt64] {
        cpus.indices.map { memory.blocks[0].mapping.load(at: 0x8000 + $0 * 64, as: UInt64.self) }
    }

    /// Waits until every vCPU has made `count` more passes, or one has failed.
    func awaitPasses(_ count: UInt64 = 2) throws {
        let before = passes
        try waitFor("every vCPU to go on") { !failed.isEmpty || zip(before, passes).allSatisfy { $1 >= $0 + count } }
    }

    var layout: FlatView { view.withLock { $0 } }

    /// What the writers count in each page of a block.
    func contents(of block: Int) -> [UInt64] {
        (0..<Self.arenaPages).map { memory.blocks[block].mapping.load(at: $0 * 4096 + 8, as: UInt64.self) }
    }

    /// Has the pages that a block's table shows begin with something that is no page's index, or with what they should.
    func spoil(_ block: Int, _ isSpoilt: Bool) {
        for page in 0..<Self.walkedPages {
            let place = 0x100000 + (block % 2 * Self.walkedPages + page) * 4096
            memory.blocks[0].mapping.store(isSpoilt ? 0xbad : UInt64(page), at: place)
        }
    }

    func whenWrittenBehind(_ body: @escaping @Sendable () -> Void) { whenWritten.withLock { $0 = body } }

    func show(_ pieces: [(pages: Range<Int>, block: Int, isReadOnly: Bool)]) throws {
        let new = Self.view(pieces, memory.blocks)
        try view.withLock { view in
            try slots.commit(FlatViewChange(old: view, new: new, removed: [], added: new.ranges))
            view = new
        }
    }

    // MARK: Bus

    func portRead(_ port: UInt16, size: Int, from cpu: any VirtualCPU) -> UInt32 { .max }
    func portWrite(_ port: UInt16, size: Int, value: UInt32, from cpu: any VirtualCPU) {}

    func memoryRead(_ address: GuestPhysicalAddress, size: Int) -> UInt64 {
        let range = view.withLock { $0.range(at: address) }
        guard let range, size == 8 else { return .max }
        return range.block.mapping.load(
            at: Int(range.offset.value + address.value - range.guestAddress.value), as: UInt64.self)
    }

    func memoryWrite(_ address: GuestPhysicalAddress, size: Int, value: UInt64) {
        let range = view.withLock { $0.range(at: address) }
        if range == nil, address.value >= Self.arena + UInt64(Self.arenaPages) * 4096 {
            whenWritten.withLock(\.self)?()
        }
        guard let range, !range.isReadOnly else { return }
        let offset = Int(range.offset.value + address.value - range.guestAddress.value)
        range.block.mapping.store(value, at: offset)
        memory.hostWrites.record(range.block, offset: offset, count: size)
    }
}

enum GuestCode {
    /// Passes over r13 pages from r12 on, counted at rbx. Each page begins with its index, or reads as all ones where nothing is; with r14
    /// set its code is called, which returns the index. Whatever else is found is stored behind the count, with its address.
    ///
    ///     read:  1: xor %ebp,%ebp; 2: mov %rbp,%rdi; shl $12,%rdi; add %r12,%rdi; mov (%rdi),%rax; cmp $-1,%rax; je 3f
    ///     mov %eax,%ecx; and $0xfff,%ecx; cmp %ebp,%ecx; jne 9f; test %r14,%r14; jz 3f; lea 16(%rdi),%rdx; call *%rdx
    ///     cmp %ebp,%eax; jne 9f; 3: inc %rbp; cmp %r13,%rbp; jb 2b; incq (%rbx); jmp 1b
    ///     9: mov %rax,8(%rbx); mov %rdi,16(%rbx); 8: pause; jmp 8b
    ///     write: 1: xor %ebp,%ebp; 2: mov %rbp,%rdi; shl $12,%rdi; add %r12,%rdi; incq 8(%rdi)
    ///     inc %rbp; cmp %r13,%rbp; jb 2b; incq (%rbx); jmp 1b
    static let program = bytes(
        "31ed4889ef48c1e70c4c01e7488b074883f8ff741b89c181e1ff0f000039e9751c4d85f6740a488d5710ffd239e8750d48ffc54c39ed72ca"
            + "48ff03ebc34889430848897b10f390ebfc31ed4889ef48c1e70c4c01e748ff470848ffc54c39ed72ea48ff03ebe3")
    static let writer: UInt64 = 0x49

    private static func bytes(_ digits: String) -> [UInt8] {
        stride(from: 0, to: digits.utf8.count, by: 2).map { UInt8(digits.dropFirst($0).prefix(2), radix: 16)! }
    }

    /// 64-bit user mode with page tables at 0x10000, a stack of its own below 0x8000, and nobody to take an exception.
    static func enterUserMode(_ cpu: KVMVirtualCPU) throws {
        func segment(_ selector: UInt16, _ type: UInt8, long: UInt8) -> kvm_segment {
            var segment = kvm_segment()
            (segment.limit, segment.selector, segment.type) = (.max, selector, type)
            (segment.present, segment.dpl, segment.s, segment.g) = (1, 3, 1, 1)
            (segment.l, segment.db) = (long, 1 - long)
            return segment
        }
        var state = kvm_sregs()
        try #require(unsafe gw_kvm_get_sregs(cpu.descriptor.number, &state) == 0)
        state.cs = segment(0x2b, 11, long: 1)
        let data = segment(0x23, 3, long: 0)
        (state.ds, state.es, state.fs, state.gs, state.ss) = (data, data, data, data, data)
        (state.cr0, state.cr3, state.cr4, state.efer) = (0x8005_0033, 0x10000, 0x620, 0xd01)
        try #require(unsafe gw_kvm_set_sregs(cpu.descriptor.number, &state) == 0)
        var registers = kvm_regs()
        (registers.rflags, registers.rsp) = (2, UInt64(0x7000 - cpu.index * 64))
        try #require(unsafe gw_kvm_set_regs(cpu.descriptor.number, &registers) == 0)
        var run = kvm_mp_state()
        run.mp_state = UInt32(KVM_MP_STATE_RUNNABLE)
        _ = unsafe gw_kvm_set_mp_state(cpu.descriptor.number, &run)
    }
}
