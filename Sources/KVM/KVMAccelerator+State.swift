public import Accelerator
import CLinux
import Glibc
import Host

// The machine's own state: two interrupt controllers of a PC (PIC pair and IOAPIC), the timer, the clock of kvmclock guests.

extension KVMAccelerator {
    public var systemSections: [(name: String, version: UInt32)] {
        [("godwit/irqchip", 1), ("godwit/pit", 1), ("godwit/kvmclock", 1)]
    }

    /// Bodies are the kernel's structures, little-endian: three `struct kvm_irqchip`, one `kvm_pit_state2`, one `kvm_clock_data`.
    public func saveSystem() throws(AcceleratorError) -> [SystemState] { try Self.systemState(of: machine) }

    static func systemState(of machine: Descriptor) throws(AcceleratorError) -> [SystemState] {
        var chips: [UInt8] = []
        for number in 0..<UInt32(3) {
            var chip = kvm_irqchip()
            chip.chip_id = number
            try kvm(unsafe gw_kvm_get_irqchip(machine.number, &chip), "KVM_GET_IRQCHIP \(number)")
            chips += unsafe withUnsafeBytes(of: &chip) { unsafe Array($0) }
        }
        var pit = kvm_pit_state2()
        try kvm(unsafe gw_kvm_get_pit2(machine.number, &pit), "KVM_GET_PIT2")
        var clock = kvm_clock_data()
        try kvm(unsafe gw_kvm_get_clock(machine.number, &clock), "KVM_GET_CLOCK")
        return [
            SystemState(name: "godwit/irqchip", version: 1, body: chips),
            SystemState(name: "godwit/pit", version: 1, body: unsafe withUnsafeBytes(of: &pit) { unsafe Array($0) }),
            SystemState(
                name: "godwit/kvmclock", version: 1, body: unsafe withUnsafeBytes(of: &clock) { unsafe Array($0) }),
        ]
    }

    public func loadSystem(_ state: SystemState, clock advance: ClockAdvance) throws(AcceleratorError) {
        switch state.name {
        case "godwit/irqchip":
            let size = MemoryLayout<kvm_irqchip>.size
            guard state.body.count == 3 * size else { throw Self.wrongLength(state, 3 * size) }
            for number in 0..<3 {
                var chip = kvm_irqchip()
                unsafe withUnsafeMutableBytes(of: &chip) {
                    unsafe $0.copyBytes(from: state.body[number * size..<(number + 1) * size])
                }
                guard chip.chip_id == UInt32(number) else {
                    throw AcceleratorError("section \(state.name): controller \(chip.chip_id) where \(number) belongs")
                }
                try kvm(unsafe gw_kvm_set_irqchip(machine.number, &chip), "KVM_SET_IRQCHIP \(number)")
            }
        case "godwit/pit":
            var pit = kvm_pit_state2()
            try Self.copy(state, into: &pit)
            try kvm(unsafe gw_kvm_set_pit2(machine.number, &pit), "KVM_SET_PIT2")
        case "godwit/kvmclock":
            var saved = kvm_clock_data()
            try Self.copy(state, into: &saved)
            var clock = kvm_clock_data()
            clock.clock = saved.clock &+ advance.nanoseconds
            try kvm(unsafe gw_kvm_set_clock(machine.number, &clock), "KVM_SET_CLOCK")
        default:
            throw AcceleratorError("section \(state.name): KVM has no state of this name")
        }
    }

    public func resetSystem() throws(AcceleratorError) {
        for state in powerOn where state.name != "godwit/kvmclock" { try loadSystem(state, clock: .none) }
    }

    private static func copy<T: BitwiseCopyable>(_ state: SystemState, into value: inout T) throws(AcceleratorError) {
        guard state.body.count == MemoryLayout<T>.size else { throw wrongLength(state, MemoryLayout<T>.size) }
        unsafe withUnsafeMutableBytes(of: &value) { unsafe $0.copyBytes(from: state.body) }
    }

    private static func wrongLength(_ state: SystemState, _ expected: Int) -> AcceleratorError {
        AcceleratorError("section \(state.name): \(state.body.count) bytes instead of \(expected)")
    }
}
