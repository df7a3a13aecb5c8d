/// Columns of text under headings.
public struct TextTable: Sendable {
    public enum Alignment: Sendable { case left, right }

    private let columns: [(heading: String, alignment: Alignment)]
    private var rows: [[String]] = []

    public init(_ columns: [(heading: String, alignment: Alignment)]) { self.columns = columns }

    /// - Precondition: as many cells as there are columns.
    public mutating func add(_ cells: [String]) {
        precondition(cells.count == columns.count, "a cell for each column")
        rows.append(cells)
    }

    /// The heading and the rows, each line with its newline.
    public var text: String {
        let all = [columns.map(\.heading)] + rows
        let widths = columns.indices.map { column in all.map { $0[column].count }.max() ?? 0 }
        return all.map { row in
            var line = ""
            for (column, cell) in row.enumerated() {
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                line += columns[column].alignment == .left ? cell + padding : padding + cell
                line += "  "
            }
            return line.reversed().drop { $0 == " " }.reversed().map(String.init).joined() + "\n"
        }.joined()
    }
}
