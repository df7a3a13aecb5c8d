import Testing

/// What of CONTRIBUTING.md a program can check. Each rule is also shown a file that breaks it.
@Suite("House")
struct HouseTests {
    private static func list(_ found: [String]) -> Comment { Comment(rawValue: found.joined(separator: "\n")) }

    @Test("no file is longer than 500 lines")
    func fileLength() throws {
        let found = HouseRules.filesTooLong(try SourceTree.swift())
        #expect(found.isEmpty, Self.list(found))
        let long = String(repeating: "\n", count: 500)
        #expect(HouseRules.filesTooLong([SourceFile("Sources/Host/A.swift", long)]).count == 1)
        #expect(HouseRules.filesTooLong([SourceFile("Sources/Host/A+Generated.swift", long)]).isEmpty)
    }

    @Test("no function is longer than 70 lines")
    func functionLength() throws {
        let found = HouseRules.functionsTooLong(try SourceTree.swift())
        #expect(found.isEmpty, Self.list(found))
        for head in ["    public mutating func a() {", "    init(", "    @inline(__always) static func b<T>(x: T)"] {
            let planted = ([head] + Array(repeating: "        work()", count: 69) + ["    }"]).joined(separator: "\n")
            #expect(HouseRules.functionsTooLong([SourceFile("Sources/Host/A.swift", planted)]).count == 1, "\(head)")
        }
    }

    @Test("no file is named after a grab bag")
    func names() throws {
        let found = HouseRules.grabBagNames(try SourceTree.swift())
        #expect(found.isEmpty, Self.list(found))
        #expect(HouseRules.grabBagNames([SourceFile("Sources/QMP/JSONUtils.swift", "")]).count == 1)
    }

    @Test("nothing is left undone in the code")
    func undone() throws {
        let files = try SourceTree.files(
            under: ["Sources", "Tests", "Guests"], ending: [".swift", ".h", ".c", ".s", ".inc"])
        let found = HouseRules.leftUndone(files)
        #expect(found.isEmpty, Self.list(found))
        #expect(HouseRules.leftUndone([SourceFile("Sources/QMP/A.swift", "// TO" + "DO: later")]).count == 1)
    }

    @Test("no file imports full Foundation, Dispatch or XCTest")
    func imports() throws {
        let found = HouseRules.unwantedImports(try SourceTree.swift())
        #expect(found.isEmpty, Self.list(found))
        let planted = SourceFile("Sources/QMP/A.swift", "@preconcurrency public import Foundation")
        #expect(HouseRules.unwantedImports([planted]).count == 1)
        #expect(HouseRules.unwantedImports([SourceFile("Sources/QMP/A.swift", "import FoundationEssentials")]).isEmpty)
    }

    @Test("every test file claims something")
    func claims() throws {
        let found = HouseRules.testsWithoutClaims(try SourceTree.files(under: ["Tests"], ending: [".swift"]))
        #expect(found.isEmpty, Self.list(found))
        let planted = SourceFile("Tests/QMPTests/A.swift", "@" + "Test(\"all is well\") func a() {}")
        #expect(HouseRules.testsWithoutClaims([planted]).count == 1)
    }

    @Test("every link between documents leads to a file")
    func links() throws {
        let documents =
            try SourceTree.files(under: ["."], ending: [".md"])
            + SourceTree.files(under: ["Documentation"], ending: [".md"])
        #expect(documents.count >= 5)
        let found = try HouseRules.brokenLinks(documents, exists: SourceTree.exists)
        #expect(found.isEmpty, Self.list(found))
        let planted = SourceFile(
            "Documentation/a.md", "see [this](b.md#part), [that](../C.md) and [it](https://a.example/)")
        #expect(HouseRules.brokenLinks([planted]) { $0 == "Documentation/../C.md" }.count == 1)
    }
}

/// The rooms and the arrows between them.
@Suite("Rooms")
struct RoomTests {
    private static let planted = RoomPlan(
        manifest: SourceFile(
            "Package.swift",
            """
            .target(name: "Low"),
            room("High", standsOn: ["Low", "Higher"]),
            room(
                "Higher",
                standsOn: ["High"]),
            .target(name: "TestSupport", dependencies: ["Low"], path: "Tests/Support"),
            """))

    @Test("arrows in Package.swift point down only")
    func manifest() throws {
        let plan = RoomPlan(manifest: try SourceTree.file("Package.swift"))
        #expect(plan.rooms.count >= 14)
        #expect(plan.standsOn("KVM") == ["CLinux", "Host", "GuestMemory", "Accelerator"])
        #expect(plan.upwardArrows == [])
        #expect(Self.planted.rooms.map(\.name) == ["Low", "High", "Higher"])
        #expect(Self.planted.upwardArrows == ["Package.swift: High stands on Higher, which is not below it"])
    }

    @Test("a room imports only what it stands on")
    func imports() throws {
        let plan = RoomPlan(manifest: try SourceTree.file("Package.swift"))
        let found = plan.upwardImports(try SourceTree.files(under: ["Sources"], ending: [".swift"]))
        #expect(found == [])
        let file = SourceFile("Sources/Low/A.swift", "import Glibc\npublic import High")
        #expect(
            Self.planted.upwardImports([file]) == [
                "Sources/Low/A.swift:2: Low imports High, on which it does not stand"
            ])
    }

    @Test("the table of rooms in ARCHITECTURE.md is that of Package.swift")
    func table() throws {
        let plan = RoomPlan(manifest: try SourceTree.file("Package.swift"))
        #expect(plan.disagreements(with: try SourceTree.file("ARCHITECTURE.md")) == [])
        let document = SourceFile("A.md", "| Low | |\n| High | Low, Higher |\n| Higher | Low |")
        #expect(Self.planted.disagreements(with: document) == ["A.md: Higher stands on High, not on 'Low'"])
    }
}
