/// Which room stands on which, as `Package.swift` says it.
struct RoomPlan {
    /// Rooms in the order of the manifest, lowest first, each with what it may import.
    private(set) var rooms: [(name: String, standsOn: [String])] = []

    /// Reads `.target(name: "CLinux")` and `room("KVM", standsOn: ["CLinux", "Host"])`, on one line or several, and the
    /// executable.
    init(manifest: SourceFile) {
        let code = manifest.lines.filter { !$0.drop { $0 == " " }.hasPrefix("//") }.joined(separator: " ")
        let calls = [".target(name:", "room(", ".executableTarget("]
        var rest = code[...]
        while let start = calls.compactMap({ rest.firstRange(of: $0) }).min(by: { $0.lowerBound < $1.lowerBound }) {
            rest = rest[start.upperBound...]
            let strings = Self.strings(in: rest.prefix { $0 != ")" })
            // The functions' own declarations have no name in quotes; a target with a path of its own is no room.
            guard let name = strings.first, !strings.contains(where: { $0.contains("/") }) else { continue }
            rooms.append((name, Array(strings.dropFirst())))
        }
    }

    private static func strings(in text: Substring) -> [String] {
        let parts = text.split(separator: "\"", omittingEmptySubsequences: false)
        return parts.indices.filter { $0 % 2 == 1 && $0 < parts.count - 1 }.map { String(parts[$0]) }
    }

    func standsOn(_ room: some StringProtocol) -> [String]? { rooms.first { $0.name == room }?.standsOn }

    /// Rooms that stand on something which is not below them.
    var upwardArrows: [String] {
        rooms.indices.flatMap { index in
            let below = Set(rooms[..<index].map(\.name))
            return rooms[index].standsOn.filter { !below.contains($0) }
                .map { "Package.swift: \(rooms[index].name) stands on \($0), which is not below it" }
        }
    }

    /// Imports of rooms that the importing room does not stand on.
    func upwardImports(_ files: [SourceFile]) -> [String] {
        let names = Set(rooms.map(\.name))
        return files.flatMap { file -> [String] in
            guard let allowed = standsOn(file.room) else {
                return ["\(file.path): Package.swift has no room \(file.room)"]
            }
            return file.imports.filter { names.contains(String($0.module)) && !allowed.contains(String($0.module)) }
                .map { "\(file.path):\($0.line): \(file.room) imports \($0.module), on which it does not stand" }
        }
    }

    /// Rows `| room | stands on |` of a table that say something else than the manifest.
    func disagreements(with document: SourceFile) -> [String] {
        rooms.compactMap { room in
            guard room.name != "godwit" else { return nil }
            let row = document.lines.first { $0.hasPrefix("| \(room.name) |") }
            guard let row else { return "\(document.path): the table of rooms lacks \(room.name)" }
            let cells = row.split(separator: "|", omittingEmptySubsequences: false).map(Self.trimmed)
            let listed = cells.count > 2 ? cells[2].split(separator: ",").map { Self.trimmed($0) } : []
            guard listed != room.standsOn else { return nil }
            return "\(document.path): \(room.name) stands on \(room.standsOn.joined(separator: ", ")), not on "
                + "'\(listed.joined(separator: ", "))'"
        }
    }

    private static func trimmed(_ text: Substring) -> String {
        String(text.drop { $0 == " " }.reversed().drop { $0 == " " }.reversed())
    }
}
