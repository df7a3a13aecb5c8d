/// The rules of the house, each as a function from files to sentences about what breaks it.
enum HouseRules {
    static let longestFile = 500
    static let longestFunction = 70

    static func filesTooLong(_ files: [SourceFile]) -> [String] {
        files.filter { !$0.isGenerated && $0.lines.count > longestFile }
            .map { "\($0.path): \($0.lines.count) lines, at most \(longestFile); make it two files" }
    }

    /// A function begins in a line with `func` or `init` that opens a brace, and ends at the brace of the same indentation:
    /// the formatter sees to that.
    static func functionsTooLong(_ files: [SourceFile]) -> [String] {
        files.filter { !$0.isGenerated }.flatMap { file in
            file.lines.indices.compactMap { start -> String? in
                guard isFunctionHead(file.lines[start]) else { return nil }
                let margin = file.lines[start].prefix { $0 == " " }
                // What follows a head stands deeper; a requirement of a protocol has nothing that follows.
                guard start + 1 < file.lines.count, file.lines[start + 1].hasPrefix(margin + " ") else { return nil }
                guard let end = file.lines[start...].firstIndex(where: { $0.hasPrefix(margin + "}") }) else {
                    return nil
                }
                let count = end - start + 1
                guard count > longestFunction else { return nil }
                return "\(file.path):\(start + 1): a function of \(count) lines, at most \(longestFunction)"
            }
        }
    }

    private static func isFunctionHead(_ line: Substring) -> Bool {
        let code = line.drop { $0 == " " }
        guard !code.hasPrefix("//") else { return false }
        let words = code.split(separator: " ").prefix(8)
        guard let place = words.firstIndex(where: { $0 == "func" || $0.hasPrefix("init(") || $0.hasPrefix("init<") }),
            words[..<place].allSatisfy({ $0.hasPrefix("@") || modifiers.contains($0) })
        else { return false }
        // A function of one line has no body to measure.
        return !(code.contains("{") && code.hasSuffix("}"))
            && (code.hasSuffix("{") || code.hasSuffix("(") || code.hasSuffix(")") || code.hasSuffix(","))
    }

    private static let modifiers: Set<Substring> = [
        "public", "private", "fileprivate", "internal", "package", "static", "mutating", "final", "override",
        "consuming", "borrowing", "nonisolated", "required", "convenience",
    ]

    static func grabBagNames(_ files: [SourceFile]) -> [String] {
        let bags = ["Util", "Helper", "Common", "Manager", "Misc", "Extras"]
        return files.compactMap { file in
            guard let bag = bags.first(where: { file.name.contains($0) }) else { return nil }
            return "\(file.path): '\(bag)' says nothing; name the file after what is in it"
        }
    }

    /// Words are put together here, so that this file does not break its own rule.
    static func leftUndone(_ files: [SourceFile]) -> [String] {
        let marks = ["TO" + "DO", "FIX" + "ME", "XX" + "X:"]
        return files.flatMap { file in
            file.lines.enumerated().compactMap { index, line in
                marks.first { line.contains($0) }.map {
                    "\(file.path):\(index + 1): \($0); finish it, or refuse it with a sentence"
                }
            }
        }
    }

    static func unwantedImports(_ files: [SourceFile]) -> [String] {
        files.flatMap { file in
            file.imports.filter { ["Foundation", "Dispatch", "XCTest"].contains($0.module) }
                .map { "\(file.path):\($0.line): imports \($0.module), which this project does without" }
        }
    }

    /// Test files with tests that claim nothing.
    static func testsWithoutClaims(_ files: [SourceFile]) -> [String] {
        files.compactMap { file in
            guard file.lines.contains(where: { $0.contains("@" + "Test") }) else { return nil }
            let claims = ["#expect", "#require", "Issue.record", "expect("]
            let claimsSomething = file.lines.contains { line in claims.contains { line.contains($0) } }
            return claimsSomething ? nil : "\(file.path): its tests claim nothing"
        }
    }

    /// Links of Markdown to other files, relative to the file they are in.
    static func brokenLinks(_ files: [SourceFile], exists: (String) throws -> Bool) rethrows -> [String] {
        var broken: [String] = []
        for file in files {
            let folder = file.path.split(separator: "/").dropLast().map { $0 + "/" }.joined()
            for (index, line) in file.lines.enumerated() {
                for piece in line.split(separator: "](", omittingEmptySubsequences: false).dropFirst() {
                    let target = piece.prefix { $0 != ")" && $0 != "#" }
                    guard !target.isEmpty, !target.contains(":"), try !exists(folder + target) else { continue }
                    broken.append("\(file.path):\(index + 1): no such file: \(target)")
                }
            }
        }
        return broken
    }
}
