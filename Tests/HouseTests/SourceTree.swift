import Host

/// A text file of the project: its path from the root, and its lines.
struct SourceFile: Sendable {
    let path: String
    let lines: [Substring]

    init(_ path: String, _ text: String) {
        self.path = path
        lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    }

    var name: Substring { path.split(separator: "/").last ?? "" }
    var isGenerated: Bool { name.contains("+Generated.") }

    /// The target the file belongs to: `KVM` for `Sources/KVM/KVMSlots.swift`.
    var room: Substring {
        let parts = path.split(separator: "/")
        return parts.count > 2 ? parts[1] : ""
    }

    /// The modules it imports, with the numbers of the lines that do.
    var imports: [(line: Int, module: Substring)] {
        lines.enumerated().compactMap { index, line in
            let words = line.split(separator: " ")
            guard let keyword = words.firstIndex(of: "import"), keyword + 1 < words.count,
                words[..<keyword].allSatisfy({ $0.hasPrefix("@") || ["public", "package", "internal"].contains($0) })
            else { return nil }
            return (index + 1, words[keyword + 1])
        }
    }
}

/// The files of this repository, as they are on disk.
enum SourceTree {
    /// Where the repository is: this file is in Tests/HouseTests.
    static let root = #filePath.split(separator: "/").dropLast(3).map { "/" + $0 }.joined()

    /// Files below folders of the root whose name ends so, sorted by path; what begins with a dot is left out.
    static func files(under folders: [String], ending: [String]) throws -> [SourceFile] {
        var found: [SourceFile] = []
        for folder in folders { try collect(folder, ending, &found) }
        return found
    }

    static func file(_ path: String) throws -> SourceFile {
        SourceFile(path, String(decoding: try Descriptor.contents(of: "\(root)/\(path)"), as: UTF8.self))
    }

    static func exists(_ path: String) throws -> Bool { try FileSystem.status(of: "\(root)/\(path)") != nil }

    /// All Swift of ours but the manifest.
    static func swift() throws -> [SourceFile] { try files(under: ["Sources", "Tests"], ending: [".swift"]) }

    private static func collect(_ folder: String, _ ending: [String], _ found: inout [SourceFile]) throws {
        for name in try FileSystem.names(inFolder: "\(root)/\(folder)") where !name.hasPrefix(".") {
            let path = folder == "." ? name : "\(folder)/\(name)"
            if try FileSystem.status(of: "\(root)/\(path)")?.kind == .folder {
                if folder != "." { try collect(path, ending, &found) }
            } else if ending.contains(where: { name.hasSuffix($0) }) {
                found.append(try file(path))
            }
        }
    }
}
