public import CommandLineKit

extension BenchmarkOptions {
    /// Whether `--only` lets a cell of this name be measured.
    public func wants(_ cell: BenchmarkCell) -> Bool { wants(named: cell.name) }

    public func wants(named name: String) -> Bool { only.map { name.contains($0) } ?? true }

    /// To be called between cells. - Throws: `CommandFailure` once the user has asked for the end.
    public func checkInterruption() throws(CommandFailure) {
        if isInterrupted() { throw CommandFailure("interrupted") }
    }
}

extension BenchmarkCell {
    /// The values of the parameters, which is what `--only` is compared with: `log 400 MB/s sequential`.
    public var name: String { parameters.map(\.value).joined(separator: " ") }
}
