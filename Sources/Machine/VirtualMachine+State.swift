import Accelerator
import Devices
import Host
import Synchronization

/// One device's state as it travels in a migration.
public struct DeviceState: Sendable, Equatable {
    public let name: String
    public let instance: UInt32
    public let version: UInt32
    public let body: [UInt8]

    public init(name: String, instance: UInt32, version: UInt32, body: [UInt8]) {
        self.name = name
        self.instance = instance
        self.version = version
        self.body = body
    }
}

/// A section this machine sends and expects.
public struct DeviceSectionName: Sendable, Equatable, Hashable {
    public let name: String
    public let instance: UInt32
    public let version: UInt32
    /// Bytes of a body that carries no length of its own (QEMU's sections); `nil` for ours.
    public let fixedByteCount: Int?
    /// Without it the guest cannot start.
    public let isRequired: Bool
}

// What travels besides RAM. Section `godwit/clock` comes first: from it the destination knows how long the guest stood still.

extension VirtualMachine {
    /// Section `godwit/clock` version 1: be64 nanoseconds since 1970 at the moment the state was saved.
    private static let clockSection = "godwit/clock"
    private static let cpuSection = "godwit/vcpu"
    /// Clocks go on over a standstill of at most this long; a guest restored from an old file sees none of the years between.
    static let longestClockAdvance: UInt64 = 60_000_000_000

    /// Every section of this machine, in the order of saving and loading: clock, vCPUs' surroundings, vCPUs, devices.
    public var sections: [DeviceSectionName] {
        guard let accelerator, let board else {
            // QEMU's machine without devices sends its timer state; it means nothing without a vCPU.
            return [DeviceSectionName(name: "timer", instance: 0, version: 2, fixedByteCount: 24, isRequired: false)]
        }
        func section(_ name: String, _ instance: UInt32, _ version: UInt32) -> DeviceSectionName {
            DeviceSectionName(name: name, instance: instance, version: version, fixedByteCount: nil, isRequired: true)
        }
        return [section(Self.clockSection, 0, 1)]
            + accelerator.systemSections.map { section($0.name, 0, $0.version) }
            + accelerator.cpus.map { section(Self.cpuSection, UInt32($0.index), 1) }
            + board.devices.map { section($0.sectionName, $0.instance, $0.stateVersion) }
    }

    /// The state of everything but RAM. Call while the guest is stopped. - Throws: `MachineError` naming the part.
    public func saveState() throws(MachineError) -> [DeviceState] {
        guard let accelerator, let board else {
            return [DeviceState(name: "timer", instance: 0, version: 2, body: [UInt8](repeating: 0, count: 24))]
        }
        do throws(AcceleratorError) {
            let now = Clock.realtimeNanoseconds
            let stamp = stride(from: UInt64(56), through: 0, by: -8).map { UInt8(truncatingIfNeeded: now >> $0) }
            var states = [DeviceState(name: Self.clockSection, instance: 0, version: 1, body: stamp)]
            for state in try accelerator.saveSystem() {
                states.append(DeviceState(name: state.name, instance: 0, version: state.version, body: state.body))
            }
            for (cpu, body) in zip(accelerator.cpus, try Self.save(accelerator.cpus)) {
                states.append(
                    DeviceState(name: Self.cpuSection, instance: UInt32(cpu.index), version: 1, body: body))
            }
            for device in board.devices {
                states.append(
                    DeviceState(
                        name: device.sectionName, instance: device.instance, version: device.stateVersion,
                        body: device.saveState()))
            }
            return states
        } catch { throw MachineError("saving the state: \(error.description)") }
    }

    /// Loads what `saveState` of a machine like this one returned. Call before the guest ever ran.
    ///
    /// - Throws: `MachineError` naming the section that is unknown or does not fit. The machine cannot be started then.
    public func loadState(_ states: [DeviceState]) throws(MachineError) {
        guard let accelerator, let board else { return }
        try check(states, cpuCount: accelerator.cpus.count)
        let advance = try Self.clockAdvance(since: states.first { $0.name == Self.clockSection })
        do {
            var cpuStates = states.filter { $0.name == Self.cpuSection }
            for state in states where state.name != Self.clockSection {
                if state.name == Self.cpuSection {
                    // All of them where the first stands.
                    try Self.load(cpuStates, into: accelerator.cpus, clock: advance)
                    cpuStates = []
                } else if accelerator.systemSections.contains(where: { $0.name == state.name }) {
                    try accelerator.loadSystem(
                        SystemState(name: state.name, version: state.version, body: state.body), clock: advance)
                } else if let device = board.devices.first(where: {
                    $0.sectionName == state.name && $0.instance == state.instance
                }) {
                    try device.loadState(state.body, version: state.version)
                }
            }
        } catch {
            throw MachineError("\(error)")
        }
    }

    // MARK: Several processors

    /// The guest stands still for this, and a guest with many vCPUs mostly for them: they share the host's processors.
    private static func save(_ cpus: [any VirtualCPU]) throws(AcceleratorError) -> [[UInt8]] {
        let bodies = Mutex([[UInt8]](repeating: [], count: cpus.count))
        try onAllProcessors(cpus.count) { (index) throws(AcceleratorError) in
            let body = try cpus[index].save()
            bodies.withLock { $0[index] = body }
        }
        return bodies.withLock { $0 }
    }

    /// The first vCPU alone: the time stamp counters of the others are matched with its own.
    private static func load(
        _ states: [DeviceState], into cpus: [any VirtualCPU], clock: ClockAdvance
    ) throws(AcceleratorError) {
        let sorted = states.sorted { $0.instance < $1.instance }
        guard let first = sorted.first else { return }
        try cpus[Int(first.instance)].load(first.body, clock: clock)
        try onAllProcessors(sorted.count - 1) { (index) throws(AcceleratorError) in
            let state = sorted[index + 1]
            try cpus[Int(state.instance)].load(state.body, clock: clock)
        }
    }

    /// - Throws: the error of the lowest index that has one, whichever came first.
    private static func onAllProcessors(
        _ count: Int, _ body: @Sendable @escaping (Int) throws(AcceleratorError) -> Void
    ) throws(AcceleratorError) {
        let failures = Mutex<[Int: AcceleratorError]>([:])
        HostThread.forEach(in: count, atLeast: 4, isUrgent: true) { index in
            do throws(AcceleratorError) { try body(index) } catch { failures.withLock { $0[index] = error } }
        }
        if let failure = failures.withLock({ $0.min { $0.key < $1.key } }) { throw failure.value }
    }

    /// Each section of this machine must be there once, in the version it knows, and no other.
    private func check(_ states: [DeviceState], cpuCount: Int) throws(MachineError) {
        let known = sections
        var seen: Set<DeviceSectionName> = []
        for state in states {
            let object = "section \(state.name) instance \(state.instance)"
            guard let section = known.first(where: { $0.name == state.name && $0.instance == state.instance }) else {
                guard state.name != Self.cpuSection else {
                    throw MachineError(
                        "\(object): this machine has \(cpuCount) vCPUs; start both sides with the same --cpus")
                }
                throw MachineError("\(object): this machine has no such device")
            }
            guard section.version == state.version else {
                throw MachineError(
                    "\(object): version \(state.version) is not known here, only \(section.version); "
                        + "use the same release of Godwit on both sides")
            }
            guard seen.insert(section).inserted else { throw MachineError("\(object): it comes twice") }
        }
        for section in known where section.isRequired && !seen.contains(section) {
            throw MachineError("section \(section.name) instance \(section.instance): it is missing")
        }
    }

    private static func clockAdvance(since section: DeviceState?) throws(MachineError) -> ClockAdvance {
        guard let body = section?.body, body.count == 8 else {
            throw MachineError("section \(clockSection): 8 bytes are expected, \(section?.body.count ?? 0) came")
        }
        let saved = body.reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        let now = Clock.realtimeNanoseconds
        // Clocks of two hosts may disagree, and a file may be old: then the guest's time just stands still.
        guard now > saved, now - saved <= longestClockAdvance else { return .none }
        return ClockAdvance(nanoseconds: now - saved)
    }
}
