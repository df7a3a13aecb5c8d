/// Shows a migration as it goes on: one moving line on a terminal, plain lines anywhere else.
///
/// Plain lines come at most once a second, and for each new status.
public struct MigrationDisplay {
    static let plainIntervalNanoseconds: UInt64 = 1_000_000_000

    private let write: (String) -> Void
    private let isLive: Bool
    private let width: () -> Int
    private let line: LiveLine
    private var progress = MigrationProgress()
    private var lastStatus: String?
    private var lastPlain: UInt64?

    /// Shows on a terminal, if it is one.
    public init(on terminal: Terminal) {
        self.init(
            isLive: terminal.isTerminal, line: LiveLine(showsColors: terminal.showsColors),
            width: { terminal.width - 1 }, write: terminal.write)
    }

    init(isLive: Bool, line: LiveLine, width: @escaping () -> Int, write: @escaping (String) -> Void) {
        self.isLive = isLive
        self.line = line
        self.width = width
        self.write = write
    }

    /// Shows a reading. - Parameter nanoseconds: when it was taken.
    public mutating func show(_ reading: MigrationReading, at nanoseconds: UInt64) {
        let figures = progress.take(reading, at: nanoseconds)
        if isLive {
            write(LiveLine.replacing(line.text(figures, width: width())))
            return
        }
        let isNew = reading.status != lastStatus
        guard isNew || nanoseconds - (lastPlain ?? 0) >= Self.plainIntervalNanoseconds else { return }
        lastStatus = reading.status
        lastPlain = nanoseconds
        write(line.text(figures) + "\n")
    }

    /// A line that stays, such as what Ctrl-C did.
    public func note(_ text: String) {
        write((isLive ? LiveLine.removal : "") + text + "\n")
    }

    /// Takes the moving line away.
    public func finish() {
        if isLive { write(LiveLine.removal) }
    }
}
