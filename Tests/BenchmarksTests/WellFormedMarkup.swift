/// A reader of XML that checks what an SVG file of ours must keep: every tag closed in order, attributes quoted and named once,
/// no bare `&` or `<`.
struct WellFormedMarkup {
    struct Fault: Error, CustomStringConvertible {
        let description: String
    }

    /// How often each element opened.
    private(set) var elements: [String: Int] = [:]
    /// All text between tags, entities as they are.
    private(set) var texts: [String] = []
    private var open: [String] = []

    init(_ markup: String) throws {
        var rest = markup[...]
        while !rest.isEmpty {
            if rest.first == "<" {
                guard let end = rest.firstIndex(of: ">") else { throw Fault(description: "a tag that does not end") }
                try readTag(rest[rest.index(after: rest.startIndex)..<end])
                rest = rest[rest.index(after: end)...]
            } else {
                let text = rest.prefix { $0 != "<" }
                try Self.checkEntities(text)
                guard !open.isEmpty || text.allSatisfy(\.isWhitespace) else {
                    throw Fault(description: "text outside of the root: \(text)")
                }
                if !text.allSatisfy(\.isWhitespace) { texts.append(String(text)) }
                rest = rest[text.endIndex...]
            }
        }
        guard open.isEmpty else { throw Fault(description: "not closed: \(open)") }
    }

    private mutating func readTag(_ tag: Substring) throws {
        if tag.hasPrefix("/") {
            guard open.popLast() == String(tag.dropFirst()) else { throw Fault(description: "</\(tag.dropFirst())>") }
            return
        }
        let isClosed = tag.hasSuffix("/")
        let body = isClosed ? tag.dropLast() : tag
        let name = String(body.prefix { $0 != " " })
        guard !name.isEmpty, name.allSatisfy(\.isLetter) else { throw Fault(description: "element '\(name)'") }
        try readAttributes(body.dropFirst(name.count))
        elements[name, default: 0] += 1
        if !isClosed { open.append(name) }
    }

    private func readAttributes(_ text: Substring) throws {
        var rest = text.drop { $0 == " " }
        var names: Set<Substring> = []
        while !rest.isEmpty {
            let name = rest.prefix { $0 != "=" }
            guard !name.isEmpty, names.insert(name).inserted else { throw Fault(description: "attribute '\(name)'") }
            let value = rest[name.endIndex...].dropFirst()
            guard value.first == "\"", let end = value.dropFirst().firstIndex(of: "\"") else {
                throw Fault(description: "attribute \(name) is not quoted")
            }
            try Self.checkEntities(value[..<end])
            rest = value[value.index(after: end)...].drop { $0 == " " }
        }
    }

    private static func checkEntities(_ text: Substring) throws {
        for piece in text.split(separator: "&", omittingEmptySubsequences: false).dropFirst() {
            guard ["amp;", "lt;", "gt;", "quot;"].contains(where: { piece.hasPrefix($0) }) else {
                throw Fault(description: "a bare & in '\(text)'")
            }
        }
    }
}
