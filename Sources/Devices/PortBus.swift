/// The I/O port space: finds the device behind a port in one table look-up.
///
/// Immutable after construction, so vCPU threads use it without a lock.
public struct PortBus: Sendable {
    /// The devices, in the order they were given.
    public let devices: [any PortDevice]

    private struct Slot: Sendable {
        let device: any PortDevice
        let lastPort: UInt16
        let width: PortAccessSize
    }

    private let slots: [Slot]
    /// For each of the 65,536 ports, 1 + the index of its slot, or 0.
    private let slotOfPort: [UInt8]

    /// Puts `devices` on the bus.
    ///
    /// - Throws: `PortBusError` when two ranges overlap, or when there are more than 255.
    public init(_ devices: [any PortDevice]) throws(PortBusError) {
        var slots: [Slot] = []
        var slotOfPort = [UInt8](repeating: 0, count: 0x10000)
        for device in devices {
            for range in device.portRanges {
                guard let slotNumber = UInt8(exactly: slots.count + 1) else { throw .tooManyRanges }
                for port in range.ports {
                    let taken = slotOfPort[Int(port)]
                    guard taken == 0 else {
                        throw .overlap(port: port, slots[Int(taken) - 1].device.name, device.name)
                    }
                    slotOfPort[Int(port)] = slotNumber
                }
                slots.append(Slot(device: device, lastPort: range.ports.upperBound, width: range.width))
            }
        }
        self.devices = devices
        self.slots = slots
        self.slotOfPort = slotOfPort
    }

    /// A guest's IN. Ports that no device claims, and those past 0xffff, read as all-ones.
    public func read(port: UInt16, size: PortAccessSize) -> UInt32 {
        if let device = deviceTaking(port: port, size: size) {
            return device.read(port: port, size: size) & size.allOnes
        }
        guard size > .byte else { return size.allOnes }
        var value: UInt32 = 0
        for index in 0..<size.byteCount {
            let byte = UInt16(exactly: Int(port) + index).map { read(port: $0, size: .byte) } ?? 0xff
            value |= byte << (8 * UInt32(index))
        }
        return value
    }

    /// A guest's OUT. What goes to ports that no device claims is dropped.
    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        if let device = deviceTaking(port: port, size: size) {
            return device.write(port: port, size: size, value: value & size.allOnes)
        }
        guard size > .byte else { return }
        for index in 0..<size.byteCount {
            guard let bytePort = UInt16(exactly: Int(port) + index) else { return }
            write(port: bytePort, size: .byte, value: value >> (8 * UInt32(index)) & 0xff)
        }
    }

    /// Resets every device, in order.
    public func reset() {
        for device in devices { device.reset() }
    }

    /// The device that takes this access whole, if one does.
    private func deviceTaking(port: UInt16, size: PortAccessSize) -> (any PortDevice)? {
        let slotNumber = Int(slotOfPort[Int(port)])
        guard slotNumber != 0 else { return nil }
        let slot = slots[slotNumber - 1]
        guard size <= slot.width, Int(port) + size.byteCount - 1 <= Int(slot.lastPort) else { return nil }
        return slot.device
    }
}

/// Why devices cannot share a bus; its description is one sentence.
public enum PortBusError: Error, Equatable, CustomStringConvertible {
    /// Two devices claim the port.
    case overlap(port: UInt16, String, String)
    /// The table has room for 255 ranges.
    case tooManyRanges

    public var description: String {
        switch self {
        case .overlap(let port, let first, let second):
            "I/O port 0x\(String(port, radix: 16)): claimed by \(first) and by \(second)"
        case .tooManyRanges:
            "I/O port bus: more than 255 port ranges; give the machine fewer devices"
        }
    }
}
