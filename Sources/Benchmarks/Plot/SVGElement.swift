/// An element of an SVG picture: markup as a value, so that what is written is always well-formed.
struct SVGElement: Sendable {
    var name: String
    var attributes: [(name: String, value: String)]
    var text: String?
    var children: [SVGElement]

    init(
        _ name: String, _ attributes: [(name: String, value: String)] = [], text: String? = nil,
        children: [SVGElement] = []
    ) {
        self.name = name
        self.attributes = attributes
        self.text = text
        self.children = children
    }

    /// The markup, one element a line, children further in.
    func rendered(indent: Int = 0) -> String {
        let margin = String(repeating: " ", count: indent)
        let head = name + attributes.map { " \($0.name)=\"\(Self.escaped($0.value))\"" }.joined()
        if let text { return "\(margin)<\(head)>\(Self.escaped(text))</\(name)>\n" }
        guard !children.isEmpty else { return "\(margin)<\(head)/>\n" }
        return "\(margin)<\(head)>\n" + children.map { $0.rendered(indent: indent + 1) }.joined()
            + "\(margin)</\(name)>\n"
    }

    /// What XML 1.0 gives a meaning is written as an entity; control characters, which it does not allow, become blanks.
    static func escaped(_ text: String) -> String {
        var result = ""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "\"": result += "&quot;"
            case _ where scalar.value < 0x20 || scalar.value == 0xFFFE || scalar.value == 0xFFFF: result += " "
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }
}

extension SVGElement {
    static func label(
        _ text: String, x: Double, y: Double, anchor: String = "start", style: String = "ink", turned: Bool = false
    ) -> SVGElement {
        var attributes = [
            (name: "class", value: style), (name: "x", value: length(x)), (name: "y", value: length(y)),
            (name: "text-anchor", value: anchor),
        ]
        if turned { attributes.append((name: "transform", value: "rotate(-90 \(length(x)) \(length(y)))")) }
        return SVGElement("text", attributes, text: text)
    }

    static func line(from a: (x: Double, y: Double), to b: (x: Double, y: Double), style: String) -> SVGElement {
        SVGElement(
            "line",
            [
                ("class", style), ("x1", length(a.x)), ("y1", length(a.y)), ("x2", length(b.x)), ("y2", length(b.y)),
            ])
    }

    static func box(
        x: Double, y: Double, width: Double, height: Double, style: String, title: String? = nil
    ) -> SVGElement {
        SVGElement(
            "rect",
            [
                ("class", style), ("x", length(x)), ("y", length(y)), ("width", length(max(0, width))),
                ("height", length(max(0, height))),
            ], children: title.map { [SVGElement("title", text: $0)] } ?? [])
    }

    /// A tenth of a unit is as fine as anybody sees, and the same on every machine.
    static func length(_ value: Double) -> String {
        let tenths = Int((value * 10).rounded())
        let whole = "\(tenths < 0 ? "-" : "")\(abs(tenths) / 10)"
        return tenths % 10 == 0 ? whole : "\(whole).\(abs(tenths) % 10)"
    }
}
