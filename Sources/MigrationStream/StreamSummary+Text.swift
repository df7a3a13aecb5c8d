extension StreamSummary {
    /// Several lines for people.
    public var text: String {
        let state = isComplete ? "complete" : "cut off"
        var lines = ["migration stream, version \(Wire.version): \(byteCount) bytes, \(state)"]
        lines.append("machine      \(machine ?? "not named")")
        for subsection in configuration { lines.append("             \(Self.words(subsection))") }
        if !blocks.isEmpty { lines += ramLines }
        if !sections.isEmpty { lines += sectionLines }
        if commandCount > 0 {
            lines.append("commands")
            lines += commands.map { "  \(Self.pad("@\($0.position)", 14))\(Self.words($0.command))" }
            if commandCount > commands.count { lines.append("  and \(commandCount - commands.count) more") }
        }
        if let vmDescription { lines.append("description  \(vmDescription.utf8.count) bytes of JSON") }
        return lines.map(Self.printable).joined(separator: "\n") + "\n"
    }

    /// Names come from outside: no control character of theirs reaches a terminal.
    private static func printable(_ line: String) -> String {
        var result = String.UnicodeScalarView()
        for scalar in line.unicodeScalars {
            let isControl = scalar.value < 0x20 || (0x7f...0x9f).contains(scalar.value)
            result.append(isControl ? "?" : scalar)
        }
        return String(result)
    }

    private var ramLines: [String] {
        let total = blocks.reduce(0) { $0 + $1.length }
        var lines = ["ram          \(total) bytes in \(blocks.count) \(blocks.count == 1 ? "block" : "blocks")"]
        let width = 2 + (blocks.map(\.name.count) + [5]).reduce(0, max)
        if blocks.contains(where: { $0.region != nil }) { return lines + mappedLines(width) }
        // Few streams have deltas.
        let hasDeltas = blocks.contains { $0.deltaPages > 0 }
        let heads = ["bytes", "data pages", "zero pages"] + (hasDeltas ? ["delta pages"] : [])
        lines.append("  \(Self.pad("block", width))" + Self.columns(heads))
        for block in blocks {
            lines.append(
                "  \(Self.pad(block.name, width))"
                    + Self.columns(
                        ["\(block.length)", "\(block.dataPages)", "\(block.zeroPages)"]
                            + (hasDeltas ? ["\(block.deltaPages)"] : [])))
        }
        return lines
    }

    /// Of a file in which every page has its place.
    private func mappedLines(_ width: Int) -> [String] {
        let heads = ["bytes", "pages", "marked", "bitmap at", "pages at"]
        return ["  \(Self.pad("block", width))" + Self.columns(heads)]
            + blocks.map { block in
                let place = block.region.map { ["\($0.bitmapOffset)", "\($0.pagesOffset)"] } ?? ["-", "-"]
                let values = ["\(block.length)", "\(block.length / UInt64(Wire.pageSize))", "\(block.markedPages)"]
                return "  \(Self.pad(block.name, width))" + Self.columns(values + place)
            }
    }

    private var sectionLines: [String] {
        let width = 2 + (sections.map(\.name.count) + [7]).reduce(0, max)
        var lines = ["sections     \(sections.count)"]
        lines.append("  \(Self.pad("section", width))" + Self.columns(["instance", "version", "body bytes", "rounds"]))
        for section in sections {
            let rounds = section.rounds == 0 ? "-" : "\(section.rounds)"
            let note = (section.inferred ? "  length inferred" : "") + (section.ended ? "" : "  not ended")
            lines.append(
                "  \(Self.pad(section.name, width))"
                    + Self.columns([
                        "\(section.instance)", "\(section.version)", "\(section.bodyBytes)", rounds,
                    ]) + note)
        }
        return lines
    }

    private static func columns(_ values: [String]) -> String {
        values.map { String(repeating: " ", count: max(1, 14 - $0.count)) + $0 }.joined()
    }

    private static func pad(_ text: String, _ width: Int) -> String {
        text + String(repeating: " ", count: max(1, width - text.count))
    }

    private static func words(_ subsection: ConfigurationSubsection) -> String {
        switch subsection {
        case .targetPageBits(let bits): "target page bits \(bits)"
        case .capabilities(let names): "capabilities \(names.joined(separator: ", "))"
        case .uuid(let uuid): "uuid \(uuid)"
        }
    }

    private static func words(_ command: PostcopyCommand) -> String {
        switch command {
        case .advise(nil): "\(CommandType.postcopyAdvise.name) without RAM"
        case .advise(let advice?):
            "\(CommandType.postcopyAdvise.name) pages of 0x\(hexadecimal(advice.blockPageSizes)) bytes in units of "
                + "\(advice.targetPageSize)"
        case .listen: CommandType.postcopyListen.name
        case .run: CommandType.postcopyRun.name
        case .discard(let discard):
            "\(CommandType.postcopyRAMDiscard.name) \(discard.ranges.count) ranges of \(discard.block)"
        case .packaged(let byteCount): "\(CommandType.packaged.name) \(byteCount) bytes"
        case .resume: CommandType.postcopyResume.name
        case .receiveBitmap(let block): "\(CommandType.receiveBitmap.name) of \(block)"
        }
    }

    /// A command in words, for summaries and traces.
    public static func words(_ command: ForwardCommand) -> String {
        switch command {
        case .openReturnPath: CommandType.openReturnPath.name
        case .ping(let value): "\(CommandType.ping.name) 0x\(hexadecimal(UInt64(value)))"
        case .switchoverStart: CommandType.switchoverStart.name
        case .begin(let migration, let features):
            "\(CommandType.begin.name) \(migration) features 0x\(hexadecimal(features.rawValue))"
        case .prepare: CommandType.prepare.name
        case .commit: CommandType.commit.name
        case .root(let value): "\(CommandType.root.name) \(hexadecimal(value, digits: 16))"
        case .digests(let range, _):
            "\(CommandType.digests.name) \(range.count) \(range.level) of block \(range.block) from \(range.first)"
        case .commitWithin(let attempt, let nanoseconds):
            "\(CommandType.commitWithin.name) \(nanoseconds) ns of READY, attempt \(attempt)"
        case .retract(let attempt): "\(CommandType.retract.name) attempt \(attempt)"
        case .settle(let migration): "\(CommandType.settle.name) \(migration)"
        case .resume(let migration, let features):
            "\(CommandType.resume.name) \(migration) features 0x\(hexadecimal(features.rawValue))"
        case .cancel(let reason): "\(CommandType.cancel.name) \(reason)"
        case .postcopy(let command): words(command)
        case .other(let type, let length):
            (CommandType(rawValue: type).map(\.name) ?? "0x\(hexadecimal(UInt64(type)))") + " (\(length) bytes)"
        }
    }
}
