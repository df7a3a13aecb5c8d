import Synchronization

/// A 16550A serial port, COM1 of the PC: eight ports from `base`, interrupt request 4.
///
/// What the guest transmits goes at once to the `transmit` sink; what the outside sends enters a 16-byte FIFO. The
/// interrupt output is not gated by OUT2, for guests that never set it. Safe to use from any thread.
///
/// Section `godwit/uart`, version 1, 27 bytes: interrupt enable u8, FIFO control u8 (enable and trigger bits), line
/// control u8, modem control u8, scratch u8, line errors u8, modem status u8, flags u8 (bit 0: transmitter-empty
/// interrupt pending), divisor be16, number of received characters u8, these characters in 16 bytes, zero-padded.
public final class UART16550: PortDevice {
    /// The base port of COM1.
    public static let com1Base: UInt16 = 0x3f8
    /// The ISA interrupt request of COM1.
    public static let com1IRQ: UInt32 = 4

    public let name = "uart"
    public let sectionName = "godwit/uart"
    public let instance: UInt32
    public let stateVersion: UInt32 = 1
    public let portRanges: [PortRange]

    private struct State {
        var registers = UARTRegisters()
        var line = false
        /// The sender was refused characters and waits to hear of room.
        var senderWaits = false
    }

    private let state = Mutex(State())
    private let transmit: ByteSink
    private let interrupt: InterruptLine
    private let receiveRoom: @Sendable () -> Void

    /// A serial port after power-on.
    ///
    /// - Parameters:
    ///   - base: the first of its eight ports, a multiple of 8; lower bits are ignored.
    ///   - transmit: takes each character the guest sends.
    ///   - interrupt: takes the level of the interrupt output whenever it changes.
    ///   - receiveRoom: called without a lock held, on the guest's thread, once there is room again after `receive`
    ///     accepted less than it was given. It may call `receive`.
    public init(
        base: UInt16 = com1Base, instance: UInt32 = 0, transmit: @escaping ByteSink,
        interrupt: @escaping InterruptLine, receiveRoom: @escaping @Sendable () -> Void = {}
    ) {
        self.instance = instance
        portRanges = [PortRange((base & ~7)...(base | 7))]
        self.transmit = transmit
        self.interrupt = interrupt
        self.receiveRoom = receiveRoom
    }

    public func read(port: UInt16, size: PortAccessSize) -> UInt32 {
        guard let offset = UARTRegisters.Offset(rawValue: port & 7) else { return size.allOnes }
        let (value, roomForSender) = state.withLock { state in
            let value = state.registers.read(offset)
            settle(&state)
            return (value, takeRoomForSender(&state))
        }
        if roomForSender { receiveRoom() }
        return UInt32(value)
    }

    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        guard let offset = UARTRegisters.Offset(rawValue: port & 7) else { return }
        let (sent, roomForSender) = state.withLock { state in
            if state.registers.isTransmitter(offset) {
                // The transmitter fills and empties again: an edge-triggered interrupt controller must see both.
                state.registers.transmitterEmptyPending = false
                settle(&state)
            }
            let sent = state.registers.write(UInt8(truncatingIfNeeded: value), to: offset)
            settle(&state)
            return (sent, takeRoomForSender(&state))
        }
        if let sent { transmit(sent) }
        if roomForSender { receiveRoom() }
    }

    /// Gives the guest characters from outside.
    ///
    /// - Returns: how many were accepted, from the front; keep the others until `receiveRoom` is called.
    public func receive(_ bytes: some Collection<UInt8>) -> Int {
        state.withLock { state in
            let accepted = state.registers.receive(bytes)
            state.senderWaits = accepted < bytes.count
            settle(&state)
            return accepted
        }
    }

    public func reset() {
        let roomForSender = state.withLock { state in
            state.registers = UARTRegisters()
            settle(&state)
            return takeRoomForSender(&state)
        }
        if roomForSender { receiveRoom() }
    }

    public func saveState() -> [UInt8] {
        let registers = state.withLock { $0.registers }
        var writer = StateWriter()
        writer.write(registers.interruptEnable)
        writer.write(registers.fifoControl)
        writer.write(registers.lineControl)
        writer.write(registers.modemControl)
        writer.write(registers.scratch)
        writer.write(registers.lineErrors)
        writer.write(registers.modemStatus)
        writer.write(UInt8(registers.transmitterEmptyPending ? 1 : 0))
        writer.write(registers.divisor)
        writer.write(UInt8(registers.received.count))
        writer.write(bytes: registers.received)
        writer.write(bytes: repeatElement(0, count: UARTRegisters.fifoBytes - registers.received.count))
        return writer.bytes
    }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        var reader = try StateReader(body, version: version, for: self)
        var registers = UARTRegisters()
        registers.interruptEnable = try reader.readUInt8("interrupt-enable", mask: UARTRegisters.InterruptEnable.all)
        registers.fifoControl = try reader.readUInt8("fifo-control", mask: UARTRegisters.FIFOControl.kept)
        registers.lineControl = try reader.readUInt8("line-control")
        registers.modemControl = try reader.readUInt8("modem-control", mask: UARTRegisters.ModemControl.all)
        registers.scratch = try reader.readUInt8("scratch")
        registers.lineErrors = try reader.readUInt8("line-errors", mask: UARTRegisters.LineStatus.errors)
        registers.modemStatus = try reader.readUInt8("modem-status")
        registers.transmitterEmptyPending = try reader.readUInt8("flags", mask: 1) != 0
        registers.divisor = try reader.readUInt16("divisor")
        let count = try reader.readUInt8("received-count")
        let received = try reader.readBytes("received", count: UARTRegisters.fifoBytes)
        try reader.finish()
        guard count <= registers.receiverCapacity else { throw reader.impossible("received-count", UInt64(count)) }
        registers.received = Array(received.prefix(Int(count)))
        let roomForSender = state.withLock { state in
            state.registers = registers
            // Announced even if unchanged: the interrupt controller may have been replaced beneath the device.
            state.line = registers.interrupt != nil
            interrupt(state.line)
            return takeRoomForSender(&state)
        }
        if roomForSender { receiveRoom() }
    }

    private func settle(_ state: inout State) {
        let level = state.registers.interrupt != nil
        guard level != state.line else { return }
        state.line = level
        interrupt(level)
    }

    private func takeRoomForSender(_ state: inout State) -> Bool {
        let registers = state.registers
        guard state.senderWaits, !registers.isLoopback, registers.received.count < registers.receiverCapacity else {
            return false
        }
        state.senderWaits = false
        return true
    }
}
