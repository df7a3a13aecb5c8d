import CommandLineKit

extension BenchmarkReport {
    /// For people: the machine, a table for each shape of cell, the promises, the notes.
    public func text(showsColors: Bool = false) -> String {
        var text = "\(title)\n"
        for table in tables {
            var columns = table.parameters.map { ($0.uppercased(), TextTable.Alignment.left) }
            columns += table.quantities.map { ($0.uppercased(), TextTable.Alignment.right) }
            var lines = TextTable(columns)
            table.rows.forEach { lines.add($0) }
            text += "\n" + lines.text
        }
        if !result.promises.isEmpty { text += "\n" }
        let width = result.promises.map(\.name.count).max() ?? 0
        for promise in result.promises {
            let name = promise.name + String(repeating: " ", count: width - promise.name.count)
            text += "\(promise.mark(showsColors: showsColors)) \(name)  \(promise.words)\n"
        }
        if !result.notes.isEmpty { text += "\n" }
        for note in result.notes { text += "note: \(note)\n" }
        return text
    }

    /// For a document: the same as tables in Markdown.
    public var markdown: String {
        var text = "\(title).\n"
        for table in tables {
            text += "\n" + Self.row(table.parameters + table.quantities)
            text += Self.row(table.parameters.map { _ in "---" } + table.quantities.map { _ in "---:" })
            for row in table.rows { text += Self.row(row) }
        }
        if !result.promises.isEmpty { text += "\n" + Self.row(["promise", "measured", "limit", ""]) }
        if !result.promises.isEmpty { text += Self.row(["---", "---:", "---:", "---"]) }
        for promise in result.promises {
            text += Self.row([
                "`\(promise.name)`", promise.valueWords, promise.limitWords ?? "", promise.mark(showsColors: false),
            ])
        }
        if !result.notes.isEmpty { text += "\n" }
        for note in result.notes { text += "- \(note)\n" }
        return text
    }

    private static func row(_ cells: [String]) -> String {
        "|" + cells.map { " " + $0.split(separator: "|").joined(separator: "\\|") + " |" }.joined() + "\n"
    }

    private var title: String {
        let runs = result.runs == 1 ? "one run" : "medians of \(result.runs) runs"
        let memory = Amount.memory(machine.memoryBytes)
        return "\(result.bench): \(runs), \(machine.processor), \(machine.cores) processors, \(memory), "
            + "Linux \(machine.kernel), load \(Amount.decimal(machine.load, digits: 2)) at the start"
    }

    struct Table {
        var parameters: [String]
        var quantities: [String]
        var rows: [[String]]
    }

    /// Cells of one shape after another are one table.
    var tables: [Table] {
        var tables: [Table] = []
        for cell in result.cells {
            let parameters = cell.parameters.map(\.name)
            let quantities = cell.quantities.map(\.name)
            let row = cell.parameters.map(\.value) + cell.quantities.map { Digits.text($0.samples.median) }
            if let index = tables.firstIndex(where: { $0.parameters == parameters && $0.quantities == quantities }) {
                tables[index].rows.append(row)
            } else {
                tables.append(Table(parameters: parameters, quantities: quantities, rows: [row]))
            }
        }
        return tables
    }
}

extension BenchmarkPromise {
    var valueWords: String { Digits.text(value.isNaN ? nil : value) }

    /// `at most 1.05`; `nil` where nothing is promised.
    var limitWords: String? { limit.map { "\(better == .lower ? "at most" : "at least") \(Digits.text($0))" } }

    var words: String { valueWords + (limitWords.map { "  (\($0))" } ?? "") }

    func mark(showsColors: Bool) -> String {
        guard limit != nil else { return "·" }
        guard showsColors else { return holds ? "✔" : "✘" }
        return holds ? Style.green("✔") : Style.red("✘")
    }
}

/// A measured number for people: at least three digits, as many behind the point as that needs.
enum Digits {
    static func text(_ value: Double?) -> String {
        guard let value, value.isFinite else { return "-" }
        let digits =
            switch abs(value) {
            case 99.95...: 0
            case 9.995...: 1
            case 0.9995..., 0: 2
            case 0.09995...: 3
            default: 4
            }
        return Amount.decimal(value, digits: value == value.rounded() ? 0 : digits)
    }
}
