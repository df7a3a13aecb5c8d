/// The register file of a 16550A: what each register reads as and what writing it does, as values.
///
/// The transmitter is always empty, for a byte written leaves at once; and characters that wait below the receive
/// trigger level count as timed out at once. Source: PC16550D data sheet, sections 8.0 to 8.6.
struct UARTRegisters: Equatable, Sendable {
    static let fifoBytes = 16

    /// Register offsets from the base port; several mean something else for reads, for writes, or while DLAB is set.
    enum Offset: UInt16 {
        case data, interruptEnable, identification, lineControl, modemControl, lineStatus, modemStatus, scratch
    }

    enum InterruptEnable {
        static let receivedData: UInt8 = 0x01
        static let transmitterEmpty: UInt8 = 0x02
        static let lineStatus: UInt8 = 0x04
        static let modemStatus: UInt8 = 0x08
        static let all: UInt8 = 0x0f
    }

    enum FIFOControl {
        static let enable: UInt8 = 0x01
        static let clearReceiver: UInt8 = 0x02
        static let triggerLevel: UInt8 = 0xc0
        static let kept: UInt8 = enable | triggerLevel
    }

    enum LineStatus {
        static let dataReady: UInt8 = 0x01
        static let overrun: UInt8 = 0x02
        static let errors: UInt8 = 0x1e
        static let transmitterEmpty: UInt8 = 0x60
    }

    enum ModemControl {
        static let loopback: UInt8 = 0x10
        static let all: UInt8 = 0x1f
    }

    enum ModemStatus {
        static let clearToSend: UInt8 = 0x10
        static let dataSetReady: UInt8 = 0x20
        static let ringIndicator: UInt8 = 0x40
        static let carrierDetect: UInt8 = 0x80
        static let deltas: UInt8 = 0x0f
        static let trailingEdgeRing: UInt8 = 0x04
        /// The other end of the cable is always there and ready.
        static let connected = clearToSend | dataSetReady | carrierDetect
    }

    static let divisorLatchAccess: UInt8 = 0x80

    var interruptEnable: UInt8 = 0
    var fifoControl: UInt8 = 0
    var lineControl: UInt8 = 0
    var modemControl: UInt8 = 0
    var scratch: UInt8 = 0
    /// Overrun, parity, framing and break bits of the line status register, until it is read.
    var lineErrors: UInt8 = 0
    /// Lines in the high half, changes since the last read in the low half.
    var modemStatus: UInt8 = ModemStatus.connected
    var transmitterEmptyPending = false
    /// 9600 baud at the PC's clock.
    var divisor: UInt16 = 12
    var received: [UInt8] = []

    var isLoopback: Bool { modemControl & ModemControl.loopback != 0 }
    var isFIFOEnabled: Bool { fifoControl & FIFOControl.enable != 0 }
    var receiverCapacity: Int { isFIFOEnabled ? Self.fifoBytes : 1 }

    private var isDivisorLatch: Bool { lineControl & Self.divisorLatchAccess != 0 }

    private var triggerLevel: Int {
        switch fifoControl >> 6 {
        case 0: 1
        case 1: 4
        case 2: 8
        default: 14
        }
    }

    /// Interrupt sources by priority, as the identification register names them.
    enum Interrupt: UInt8 {
        case lineStatus = 0x06
        case receivedData = 0x04
        case characterTimeout = 0x0c
        case transmitterEmpty = 0x02
        case modemStatus = 0x00
    }

    /// The enabled source of the highest priority; the interrupt line is high while there is one.
    var interrupt: Interrupt? {
        if interruptEnable & InterruptEnable.lineStatus != 0, lineErrors != 0 { return .lineStatus }
        if interruptEnable & InterruptEnable.receivedData != 0, !received.isEmpty {
            return !isFIFOEnabled || received.count >= triggerLevel ? .receivedData : .characterTimeout
        }
        if interruptEnable & InterruptEnable.transmitterEmpty != 0, transmitterEmptyPending { return .transmitterEmpty }
        if interruptEnable & InterruptEnable.modemStatus != 0, modemStatus & ModemStatus.deltas != 0 {
            return .modemStatus
        }
        return nil
    }

    mutating func read(_ offset: Offset) -> UInt8 {
        switch offset {
        case .data where isDivisorLatch: return UInt8(truncatingIfNeeded: divisor)
        case .data: return received.isEmpty ? 0 : received.removeFirst()
        case .interruptEnable where isDivisorLatch: return UInt8(truncatingIfNeeded: divisor >> 8)
        case .interruptEnable: return interruptEnable
        case .identification: return readIdentification()
        case .lineControl: return lineControl
        case .modemControl: return modemControl
        case .lineStatus:
            defer { lineErrors = 0 }
            return LineStatus.transmitterEmpty | lineErrors | (received.isEmpty ? 0 : LineStatus.dataReady)
        case .modemStatus:
            defer { modemStatus &= ~ModemStatus.deltas }
            return modemStatus
        case .scratch: return scratch
        }
    }

    /// True when writing this register sends a character: it is the transmitter holding register.
    func isTransmitter(_ offset: Offset) -> Bool { offset == .data && !isDivisorLatch }

    /// Writes a register; the result is a character that leaves the UART.
    mutating func write(_ value: UInt8, to offset: Offset) -> UInt8? {
        switch offset {
        case .data where isDivisorLatch: divisor = divisor & 0xff00 | UInt16(value)
        case .data:
            transmitterEmptyPending = true
            guard isLoopback else { return value }
            loopBack(value)
        case .interruptEnable where isDivisorLatch: divisor = divisor & 0x00ff | UInt16(value) << 8
        case .interruptEnable: writeInterruptEnable(value & InterruptEnable.all)
        case .identification: writeFIFOControl(value)
        case .lineControl: lineControl = value
        case .modemControl:
            modemControl = value & ModemControl.all
            updateModemLines()
        case .lineStatus, .modemStatus: break
        case .scratch: scratch = value
        }
        return nil
    }

    /// Takes characters from the line while there is room; in loopback the line is disconnected.
    mutating func receive(_ bytes: some Collection<UInt8>) -> Int {
        guard !isLoopback else { return 0 }
        let accepted = bytes.prefix(max(0, receiverCapacity - received.count))
        received.append(contentsOf: accepted)
        return accepted.count
    }

    /// Reading the identification register answers the transmitter interrupt, but only when it is the one reported.
    private mutating func readIdentification() -> UInt8 {
        let source = interrupt
        if source == .transmitterEmpty { transmitterEmptyPending = false }
        return (source?.rawValue ?? 0x01) | (isFIFOEnabled ? 0xc0 : 0)
    }

    private mutating func writeInterruptEnable(_ value: UInt8) {
        // Enabling the transmitter interrupt while the transmitter is empty raises it: drivers start sending this way.
        if value & ~interruptEnable & InterruptEnable.transmitterEmpty != 0 { transmitterEmptyPending = true }
        interruptEnable = value
    }

    private mutating func writeFIFOControl(_ value: UInt8) {
        let enable = value & FIFOControl.enable
        if enable != fifoControl & FIFOControl.enable || value & FIFOControl.clearReceiver != 0 { received.removeAll() }
        // The other bits are not programmed unless the FIFOs are enabled in the same write.
        fifoControl = enable != 0 ? value & FIFOControl.kept : 0
    }

    private mutating func loopBack(_ value: UInt8) {
        if received.count < receiverCapacity {
            received.append(value)
        } else {
            lineErrors |= LineStatus.overrun
            // Without FIFO the new character replaces the one not read; a full FIFO keeps what it has.
            if !isFIFOEnabled { received = [value] }
        }
    }

    /// Derives the modem lines, from the control outputs in loopback, and notes the changes.
    private mutating func updateModemLines() {
        var lines = ModemStatus.connected
        if isLoopback {
            lines = 0
            if modemControl & 0x01 != 0 { lines |= ModemStatus.dataSetReady }
            if modemControl & 0x02 != 0 { lines |= ModemStatus.clearToSend }
            if modemControl & 0x04 != 0 { lines |= ModemStatus.ringIndicator }
            if modemControl & 0x08 != 0 { lines |= ModemStatus.carrierDetect }
        }
        var changes = (modemStatus ^ lines) >> 4
        // Of the ring indicator only the trailing edge counts.
        if lines & ModemStatus.ringIndicator != 0 { changes &= ~ModemStatus.trailingEdgeRing }
        modemStatus = lines | modemStatus & ModemStatus.deltas | changes
    }
}
