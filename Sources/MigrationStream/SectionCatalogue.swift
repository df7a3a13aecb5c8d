/// How the body of a device section is laid out on the wire. QEMU's bodies carry no length, so a reader must know it.
public enum SectionLayout: Hashable, Sendable {
    /// Exactly that many bytes.
    case fixed(byteCount: Int)
    /// Godwit's own sections: be32 length, then the body.
    case lengthPrefixed(maximumBytes: Int = StreamLimit.sectionBodyBytes)
}

/// The device sections one side knows: by name, one version each.
public struct SectionCatalogue: Sendable {
    struct Entry: Sendable {
        let version: UInt32
        let layout: SectionLayout
    }

    private var entries: [String: Entry] = [:]

    /// Knows ``GlobalState`` and QEMU's `timer`, the two sections of `qemu-system-x86_64 -M none`.
    public init() {
        add("timer", version: 2, layout: .fixed(byteCount: 24))
        add(GlobalState.sectionName, version: GlobalState.version, layout: .fixed(byteCount: GlobalState.byteCount))
    }

    /// Adds a section, or replaces the one of that name.
    public mutating func add(_ name: String, version: UInt32, layout: SectionLayout = .lengthPrefixed()) {
        entries[name] = Entry(version: version, layout: layout)
    }

    public func version(of name: String) -> UInt32? { entries[name]?.version }

    public func layout(of name: String) -> SectionLayout? { entries[name]?.layout }
}

/// QEMU's `globalstate` section: the run state in which the guest continues at the destination. The body is a be32 byte
/// count (the name and its NUL) and the name in a field of 100 bytes.
public struct GlobalState: Hashable, Sendable {
    public static let sectionName = "globalstate"
    public static let version: UInt32 = 1
    public static let byteCount = 104
    private static let fieldBytes = 100

    /// QEMU's name of the run state: `running`, `paused`, `prelaunch`...
    public let runState: String

    public init(runState: String) { self.runState = runState }

    /// Whether a guest in that state executes instructions.
    public var runs: Bool { runState == "running" }

    /// The section as it travels; a name longer than 99 bytes is cut.
    public var section: DeviceSection {
        let name = Array(runState.utf8.prefix(Self.fieldBytes - 1))
        var writer = StreamWriter()
        writer.be32(UInt32(name.count + 1))
        writer.append(name)
        writer.append(repeating: 0, count: Self.fieldBytes - name.count)
        return DeviceSection(name: Self.sectionName, version: Self.version, body: writer.bytes)
    }

    /// Reads a body; nil when its size field is out of range or the name is not text.
    public init?(body: [UInt8]) {
        guard body.count == Self.byteCount else { return nil }
        let size = Int(body.be32(0))
        guard (1...Self.fieldBytes).contains(size) else { return nil }
        let name = body[4..<(4 + size)].prefix { $0 != 0 }
        guard !name.isEmpty, let text = String(validating: name, as: UTF8.self) else { return nil }
        runState = text
    }
}
