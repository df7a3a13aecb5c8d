import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host

/// The parts of a virtual CPU's state, in the order in which they are loaded: CPUID and control registers before what depends on
/// them, the local APIC before the timer register (an MSR) that arms it, pending events and run state last.
private enum Part: UInt16, CaseIterable {
    case cpuid = 1, segments, registers, extendedControl, extendedState, debug, localAPIC, msrs, events, runState
}

private let tscIndex: UInt32 = 0x10
private let tscDeadlineIndex: UInt32 = 0x6e0

extension KVMVirtualCPU {
    /// Body of section `godwit/vcpu` version 1: for each part `be16 part, be32 length, bytes`; the bytes are the kernel's structures
    /// (little-endian, as in Documentation/virt/kvm/api.rst), CPUID and MSRs as (index, value) tables.
    func save() throws(AcceleratorError) -> [UInt8] {
        var body = PartList()
        // First: asking for the run state makes the kernel take a pending INIT or SIPI, which changes registers.
        let runState = unsafe try get("KVM_GET_MP_STATE", kvm_mp_state()) { unsafe gw_kvm_get_mp_state($0, $1) }
        body.append(Part.cpuid.rawValue, Self.bytes(of: cpuid.table))
        body.append(
            Part.segments.rawValue, unsafe try get("KVM_GET_SREGS", kvm_sregs()) { unsafe gw_kvm_get_sregs($0, $1) })
        body.append(
            Part.registers.rawValue, unsafe try get("KVM_GET_REGS", kvm_regs()) { unsafe gw_kvm_get_regs($0, $1) })
        body.append(
            Part.extendedControl.rawValue, unsafe try get("KVM_GET_XCRS", kvm_xcrs()) { unsafe gw_kvm_get_xcrs($0, $1) }
        )
        var area = [UInt8](repeating: 0, count: xsaveByteCount)
        let status = unsafe area.withUnsafeMutableBytes {
            unsafe gw_kvm_get_xsave2_raw(descriptor.number, $0.baseAddress!)
        }
        try kvm(status, "KVM_GET_XSAVE2")
        body.append(Part.extendedState.rawValue, area)
        body.append(
            Part.debug.rawValue,
            unsafe try get("KVM_GET_DEBUGREGS", kvm_debugregs()) { unsafe gw_kvm_get_debugregs($0, $1) })
        body.append(
            Part.localAPIC.rawValue,
            unsafe try get("KVM_GET_LAPIC", kvm_lapic_state()) { unsafe gw_kvm_get_lapic($0, $1) })
        body.append(Part.msrs.rawValue, try saveMSRs())
        body.append(
            Part.events.rawValue,
            unsafe try get("KVM_GET_VCPU_EVENTS", kvm_vcpu_events()) { unsafe gw_kvm_get_vcpu_events($0, $1) })
        body.append(Part.runState.rawValue, runState)
        return body.bytes
    }

    func load(_ state: [UInt8], clock: ClockAdvance) throws(AcceleratorError) {
        try load(state, clock: clock, keepingTSC: false)
    }

    private func load(_ state: [UInt8], clock: ClockAdvance, keepingTSC: Bool) throws(AcceleratorError) {
        let parts = try parts(of: state)
        func part(_ part: Part) -> [UInt8] { parts[part.rawValue] ?? [] }
        try loadCPUID(part(.cpuid))
        unsafe try set("KVM_SET_SREGS", part(.segments), kvm_sregs()) { unsafe gw_kvm_set_sregs($0, $1) }
        unsafe try set("KVM_SET_REGS", part(.registers), kvm_regs()) { unsafe gw_kvm_set_regs($0, $1) }
        // Each call costs some 10 us, during which the guest stands still; many vCPUs have these as they were at power-on.
        let held = untouched
        untouched = [:]
        if held[Part.extendedControl.rawValue] != part(.extendedControl) {
            unsafe try set("KVM_SET_XCRS", part(.extendedControl), kvm_xcrs()) { unsafe gw_kvm_set_xcrs($0, $1) }
        }
        if held[Part.extendedState.rawValue] != part(.extendedState) {
            try loadExtendedState(part(.extendedState))
        }
        if held[Part.debug.rawValue] != part(.debug) {
            unsafe try set("KVM_SET_DEBUGREGS", part(.debug), kvm_debugregs()) { unsafe gw_kvm_set_debugregs($0, $1) }
        }
        unsafe try set("KVM_SET_LAPIC", part(.localAPIC), kvm_lapic_state()) { unsafe gw_kvm_set_lapic($0, $1) }
        try loadMSRs(part(.msrs), clock: clock, keepingTSC: keepingTSC)
        unsafe try set("KVM_SET_VCPU_EVENTS", part(.events), kvm_vcpu_events()) {
            unsafe gw_kvm_set_vcpu_events($0, $1)
        }
        unsafe try set("KVM_SET_MP_STATE", part(.runState), kvm_mp_state()) { unsafe gw_kvm_set_mp_state($0, $1) }
    }

    /// The parts of a body of `save`.
    func parts(of state: [UInt8]) throws(AcceleratorError) -> [UInt16: [UInt8]] {
        try PartList.parse(state, of: "godwit/vcpu instance \(index)", expecting: Part.allCases.map(\.rawValue))
    }

    // MARK: Parts

    private func loadCPUID(_ bytes: [UInt8]) throws(AcceleratorError) {
        // Two hosts of a kind, which is the rule: a guest that waits need not wait for the reading.
        guard bytes != Self.bytes(of: cpuid.table) else { return }
        guard bytes.count % 40 == 8, bytes.count <= 8 + CPUID.maximumEntries * 40 else {
            throw AcceleratorError("section godwit/vcpu instance \(index): a CPUID table of \(bytes.count) bytes")
        }
        let words = stride(from: 8, to: bytes.count, by: 4).map { at in
            UInt32(bytes[at]) | UInt32(bytes[at + 1]) << 8 | UInt32(bytes[at + 2]) << 16 | UInt32(bytes[at + 3]) << 24
        }
        let wanted = CPUID(
            entries: stride(from: 0, to: words.count, by: 10).map { at in
                CPUID.Entry(
                    function: words[at], index: words[at + 1], flags: words[at + 2], eax: words[at + 3],
                    ebx: words[at + 4], ecx: words[at + 5], edx: words[at + 6])
            })
        guard wanted != cpuid else { return }
        if let missing = cpuid.firstMissing(from: wanted) {
            throw AcceleratorError(
                "vcpu\(index): the guest was started with processor features this host lacks (CPUID \(missing)); "
                    + "start it with a smaller set, or move it to a host that has them")
        }
        try Self.set(wanted, on: descriptor)
        cpuid = wanted
    }

    private func loadExtendedState(_ bytes: [UInt8]) throws(AcceleratorError) {
        // A source with fewer state components sends a shorter area; the rest is in its initial state.
        guard bytes.count >= 4096, bytes.count <= xsaveByteCount else {
            throw AcceleratorError(
                "section godwit/vcpu instance \(index): \(bytes.count) bytes of XSAVE state, this host takes 4096 to \(xsaveByteCount)"
            )
        }
        var area = bytes + [UInt8](repeating: 0, count: xsaveByteCount - bytes.count)
        let status = unsafe area.withUnsafeMutableBytes {
            unsafe gw_kvm_set_xsave_raw(descriptor.number, $0.baseAddress!)
        }
        try kvm(status, "KVM_SET_XSAVE")
    }

    private func saveMSRs() throws(AcceleratorError) -> [UInt8] {
        var table = MSRTable(msrIndices.map { ($0, 0) })
        let count = try kvm(table.get(descriptor), "KVM_GET_MSRS")
        guard Int(count) == msrIndices.count else {
            throw AcceleratorError(
                "vcpu\(index): MSR 0x\(String(msrIndices[Int(count)], radix: 16)) cannot be read any more")
        }
        var body = ByteList()
        for entry in table.entries {
            body.append(entry.index)
            body.append(entry.value)
        }
        return body.bytes
    }

    private func loadMSRs(_ bytes: [UInt8], clock: ClockAdvance, keepingTSC: Bool) throws(AcceleratorError) {
        guard bytes.count % 12 == 0, bytes.count <= 12 * 1024 else {
            throw AcceleratorError("section godwit/vcpu instance \(index): an MSR table of \(bytes.count) bytes")
        }
        var reader = ByteList(bytes)
        var entries: [(index: UInt32, value: UInt64)] = []
        while let number: UInt32 = reader.next(), let value: UInt64 = reader.next() { entries.append((number, value)) }
        if keepingTSC { entries.removeAll { $0.index == tscIndex } }
        var advance: UInt64 = 0
        if clock.nanoseconds > 0 {
            let ticks = clock.nanoseconds.multipliedFullWidth(by: try tscKilohertz())
            advance = UInt64(1_000_000).dividingFullWidth((ticks.high % 1_000_000, ticks.low)).quotient
        }
        // The counter goes before the registers that are compared with it, the deadline timer last.
        func rank(_ index: UInt32) -> Int { index == tscIndex ? 0 : index == tscDeadlineIndex ? 2 : 1 }
        entries.sort { rank($0.index) < rank($1.index) }
        entries = entries.map { $0.index == tscIndex ? ($0.index, $0.value &+ advance) : $0 }
        guard !entries.isEmpty else { return }
        if index == 0, let counter = entries.first, counter.index == tscIndex {
            // KVM takes a counter within a second of the present one for an attempt to synchronise vCPUs, and keeps the present
            // one: right for the other vCPUs, wrong for the first. So it is moved far away before (kvm_synchronize_tsc).
            var away = MSRTable([(tscIndex, counter.value &+ 1 << 50)])
            try kvm(away.set(descriptor), "KVM_SET_MSRS")
        }
        var table = MSRTable(entries)
        let count = try kvm(table.set(descriptor), "KVM_SET_MSRS")
        guard Int(count) == entries.count else {
            let refused = entries[Int(count)]
            throw AcceleratorError(
                "vcpu\(index): this host refuses MSR 0x\(String(refused.index, radix: 16)) = 0x\(String(refused.value, radix: 16))"
            )
        }
    }

    // MARK: Kernel structures

    private func get<T: BitwiseCopyable>(
        _ call: String, _ zero: T, _ body: (CInt, UnsafeMutablePointer<T>) -> CInt
    )
        throws(AcceleratorError) -> [UInt8]
    {
        var value = zero
        try kvm(unsafe body(descriptor.number, &value), call)
        return unsafe withUnsafeBytes(of: &value) { unsafe Array($0) }
    }

    private func set<T: BitwiseCopyable>(
        _ call: String, _ bytes: [UInt8], _ zero: T, _ body: (CInt, UnsafeMutablePointer<T>) -> CInt
    ) throws(AcceleratorError) {
        guard bytes.count == MemoryLayout<T>.size else {
            throw AcceleratorError(
                "section godwit/vcpu instance \(index): \(bytes.count) bytes for \(call), which takes \(MemoryLayout<T>.size)"
            )
        }
        var value = zero
        unsafe withUnsafeMutableBytes(of: &value) { unsafe $0.copyBytes(from: bytes) }
        try kvm(unsafe body(descriptor.number, &value), call)
    }

    private static func bytes(of words: [UInt32]) -> [UInt8] {
        // SAFETY: the array's own storage; KVM of this kind exists on little-endian processors alone.
        unsafe words.withUnsafeBytes { unsafe Array($0) }
    }

    // MARK: Registers and start

    func registers() throws(AcceleratorError) -> CPURegisters {
        var general = kvm_regs()
        var segments = kvm_sregs()
        try kvm(unsafe gw_kvm_get_regs(descriptor.number, &general), "KVM_GET_REGS")
        try kvm(unsafe gw_kvm_get_sregs(descriptor.number, &segments), "KVM_GET_SREGS")
        var result = CPURegisters()
        (result.rax, result.rbx, result.rcx, result.rdx) = (general.rax, general.rbx, general.rcx, general.rdx)
        (result.rsi, result.rdi, result.rsp, result.rbp) = (general.rsi, general.rdi, general.rsp, general.rbp)
        (result.r8, result.r9, result.r10, result.r11) = (general.r8, general.r9, general.r10, general.r11)
        (result.r12, result.r13, result.r14, result.r15) = (general.r12, general.r13, general.r14, general.r15)
        (result.rip, result.rflags) = (general.rip, general.rflags)
        (result.ds, result.es, result.ss) = (segments.ds.selector, segments.es.selector, segments.ss.selector)
        return result
    }

    func translate(_ address: UInt64) throws(AcceleratorError) -> GuestPhysicalAddress? {
        var translation = kvm_translation()
        translation.linear_address = address
        try kvm(unsafe gw_kvm_translate(descriptor.number, &translation), "KVM_TRANSLATE")
        return translation.valid != 0 ? GuestPhysicalAddress(translation.physical_address) : nil
    }

    func setRegisters(_ r: CPURegisters) throws(AcceleratorError) {
        var general = kvm_regs()
        (general.rax, general.rbx, general.rcx, general.rdx) = (r.rax, r.rbx, r.rcx, r.rdx)
        (general.rsi, general.rdi, general.rsp, general.rbp) = (r.rsi, r.rdi, r.rsp, r.rbp)
        (general.r8, general.r9, general.r10, general.r11) = (r.r8, r.r9, r.r10, r.r11)
        (general.r12, general.r13, general.r14, general.r15) = (r.r12, r.r13, r.r14, r.r15)
        (general.rip, general.rflags) = (r.rip, r.rflags)
        try kvm(unsafe gw_kvm_set_regs(descriptor.number, &general), "KVM_SET_REGS")
    }

    func reset(to start: StartState) throws(AcceleratorError) {
        try load(powerOn, clock: .none, keepingTSC: true)
        var segments = kvm_sregs()
        try kvm(unsafe gw_kvm_get_sregs(descriptor.number, &segments), "KVM_GET_SREGS")
        var general = CPURegisters()
        switch start {
        case .waitForSIPI: return
        case .real(let cs, let ip, let sp, let dl):
            for path in [\kvm_sregs.ds, \.es, \.fs, \.gs, \.ss] {
                (segments[keyPath: path].base, segments[keyPath: path].selector) = (0, 0)
            }
            (segments.cs.base, segments.cs.selector) = (UInt64(cs) << 4, cs)
            (segments.idt.base, segments.idt.limit) = (0, 0x3ff)
            (general.rip, general.rsp, general.rdx) = (UInt64(ip), UInt64(sp), UInt64(dl))
        case .protected32(let entry, let ebx):
            for path in [\kvm_sregs.ds, \.es, \.fs, \.gs, \.ss] {
                segments[keyPath: path] = Self.flat(selector: 0x10, type: 3)
            }
            segments.cs = Self.flat(selector: 0x08, type: 11)
            segments.cr0 = segments.cr0 & ~0x8000_0000 | 1
            general.rip = UInt64(entry)
            general.rbx = UInt64(ebx)
        }
        try kvm(unsafe gw_kvm_set_sregs(descriptor.number, &segments), "KVM_SET_SREGS")
        try setRegisters(general)
        // KVM has all processors but the first wait for INIT at power-on.
        unsafe try set("KVM_SET_MP_STATE", [UInt8](repeating: 0, count: 4), kvm_mp_state()) {
            unsafe gw_kvm_set_mp_state($0, $1)
        }
    }

    /// A flat 4 GiB segment of 32-bit protected mode. `type` as in the descriptor: 3 data, 11 code, both accessed.
    private static func flat(selector: UInt16, type: UInt8) -> kvm_segment {
        var segment = kvm_segment()
        segment.limit = 0xffff_ffff
        segment.selector = selector
        segment.type = type
        (segment.present, segment.s, segment.db, segment.g) = (1, 1, 1, 1)
        return segment
    }
}
