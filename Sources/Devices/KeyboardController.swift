import Synchronization

/// An i8042 keyboard controller with nothing plugged in: guests reset the machine and open the A20 gate through it.
///
/// Data port 0x60, command and status port 0x64. It never interrupts. The A20 bit reads back as written, but the
/// machine's A20 line is always on.
///
/// Section `godwit/i8042`, version 1, 6 bytes: status u8 (system and command flags), command byte u8, output port u8,
/// output buffer full u8 (0 or 1), output buffer u8, command that waits for its data byte u8 (0 if none).
public final class KeyboardController: PortDevice {
    public let name = "keyboard controller"
    public let sectionName = "godwit/i8042"
    public let instance: UInt32 = 0
    public let stateVersion: UInt32 = 1
    public let portRanges = [PortRange(dataPort...dataPort), PortRange(commandPort...commandPort)]

    /// Data of commands, and their answers.
    public static let dataPort: UInt16 = 0x60
    /// Commands when written, status when read.
    public static let commandPort: UInt16 = 0x64

    private enum Status {
        static let outputFull: UInt8 = 0x01
        static let system: UInt8 = 0x04
        static let lastWasCommand: UInt8 = 0x08
        static let unlocked: UInt8 = 0x10
    }

    private enum Command {
        static let readCommandByte: UInt8 = 0x20
        static let writeCommandByte: UInt8 = 0x60
        static let disableAuxiliary: UInt8 = 0xa7
        static let enableAuxiliary: UInt8 = 0xa8
        static let testAuxiliary: UInt8 = 0xa9
        static let selfTest: UInt8 = 0xaa
        static let testKeyboard: UInt8 = 0xab
        static let disableKeyboard: UInt8 = 0xad
        static let enableKeyboard: UInt8 = 0xae
        static let readOutputPort: UInt8 = 0xd0
        static let writeOutputPort: UInt8 = 0xd1
        static let writeKeyboardBuffer: UInt8 = 0xd2
        static let writeAuxiliary: UInt8 = 0xd4
        /// From here on, the low bits that are clear name output port bits to pulse low.
        static let firstPulse: UInt8 = 0xf0
        static let withData = [writeCommandByte, writeOutputPort, writeKeyboardBuffer, writeAuxiliary]
    }

    private enum CommandByte {
        static let system: UInt8 = 0x04
        static let keyboardDisabled: UInt8 = 0x10
        static let auxiliaryDisabled: UInt8 = 0x20
    }

    private enum OutputPort {
        /// Low while the processor is held in reset.
        static let notReset: UInt8 = 0x01
        static let a20: UInt8 = 0x02
        static let outputFull: UInt8 = 0x10
    }

    private struct State {
        var status: UInt8 = 0
        var commandByte = CommandByte.keyboardDisabled | CommandByte.auxiliaryDisabled
        var outputPort = OutputPort.notReset | OutputPort.a20
        var output: UInt8?
        var pendingCommand: UInt8?
    }

    private let state = Mutex(State())
    private let requestReset: @Sendable () -> Void

    /// The controller after power-on; `requestReset` is called without a lock held, on the vCPU's thread.
    public init(requestReset: @escaping @Sendable () -> Void) {
        self.requestReset = requestReset
    }

    public func read(port: UInt16, size: PortAccessSize) -> UInt32 {
        state.withLock { state in
            if port == Self.dataPort {
                defer { state.output = nil }
                return UInt32(state.output ?? 0)
            }
            let outputFull = state.output == nil ? 0 : Status.outputFull
            return UInt32(state.status | Status.unlocked | outputFull)
        }
    }

    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        let byte = UInt8(truncatingIfNeeded: value)
        let resets = state.withLock { state in
            if port == Self.dataPort {
                state.status &= ~Status.lastWasCommand
                return Self.writeData(byte, &state)
            }
            state.status |= Status.lastWasCommand
            return Self.writeCommand(byte, &state)
        }
        if resets { requestReset() }
    }

    public func reset() {
        state.withLock { $0 = State() }
    }

    public func saveState() -> [UInt8] {
        let state = state.withLock { $0 }
        return [
            state.status, state.commandByte, state.outputPort, state.output == nil ? 0 : 1, state.output ?? 0,
            state.pendingCommand ?? 0,
        ]
    }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        var reader = try StateReader(body, version: version, for: self)
        var loaded = State()
        loaded.status = try reader.readUInt8("status", mask: Status.system | Status.lastWasCommand)
        loaded.commandByte = try reader.readUInt8("command-byte")
        loaded.outputPort = try reader.readUInt8("output-port")
        let isFull = try reader.readUInt8("output-full", mask: 1) != 0
        let output = try reader.readUInt8("output")
        let pending = try reader.readUInt8("pending-command")
        try reader.finish()
        guard pending == 0 || Command.withData.contains(pending) else {
            throw reader.impossible("pending-command", UInt64(pending))
        }
        loaded.output = isFull ? output : nil
        loaded.pendingCommand = pending == 0 ? nil : pending
        state.withLock { $0 = loaded }
    }

    /// Returns true when the write asks for a reset.
    private static func writeCommand(_ command: UInt8, _ state: inout State) -> Bool {
        state.pendingCommand = nil
        switch command {
        case Command.readCommandByte: state.output = state.commandByte
        case Command.disableAuxiliary: state.commandByte |= CommandByte.auxiliaryDisabled
        case Command.enableAuxiliary: state.commandByte &= ~CommandByte.auxiliaryDisabled
        case Command.disableKeyboard: state.commandByte |= CommandByte.keyboardDisabled
        case Command.enableKeyboard: state.commandByte &= ~CommandByte.keyboardDisabled
        case Command.selfTest:
            state.status |= Status.system
            state.commandByte |= CommandByte.system
            state.output = 0x55
        case Command.testKeyboard, Command.testAuxiliary: state.output = 0x00
        case Command.readOutputPort:
            state.output = state.outputPort | (state.output == nil ? 0 : OutputPort.outputFull)
        case Command.firstPulse...: return command & OutputPort.notReset == 0
        case let command where Command.withData.contains(command): state.pendingCommand = command
        default: break
        }
        return false
    }

    /// Returns true when the write asks for a reset. Bytes for the keyboard or the mouse get no answer: none is there.
    private static func writeData(_ byte: UInt8, _ state: inout State) -> Bool {
        defer { state.pendingCommand = nil }
        switch state.pendingCommand {
        case Command.writeCommandByte:
            state.commandByte = byte
            state.status = state.status & ~Status.system | (byte & CommandByte.system)
        case Command.writeOutputPort:
            state.outputPort = byte & ~OutputPort.outputFull
            return byte & OutputPort.notReset == 0
        case Command.writeKeyboardBuffer: state.output = byte
        default: break
        }
        return false
    }
}
