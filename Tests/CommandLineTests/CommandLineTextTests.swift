import QMP
import Testing

@testable import CommandLineKit

@Suite("Names, messages and tables on the command line")
struct CommandLineTextTests {
    @Test("a VM is a name, or the path of its socket")
    func references() throws {
        #expect(try VMReference("web") == .name(VMName("web")))
        #expect(try VMReference("unix:/run/x.qmp") == .socket(path: "/run/x.qmp"))
        #expect(try VMReference("./x.qmp") == .socket(path: "./x.qmp"))
        #expect(throws: QMPError.self) { try VMReference("a b") }
        #expect(throws: QMPError.self) { try VMReference("") }
    }

    @Test("a QMP command is a name with key=value words, or JSON")
    func messages() throws {
        let words = try QMPMessage(words: ["migrate", "uri=tcp:h:1", "detach=true", "n=5", "text=a=b", "empty="])
        #expect(words.command == "migrate")
        #expect(words.arguments == ["uri": "tcp:h:1", "detach": true, "n": 5, "text": "a=b", "empty": ""])
        let json = try QMPMessage(words: [#"{"exec-oob": "migrate-pause", "arguments": {"a": [1]}}"#])
        #expect(json.isOutOfBand && json.command == "migrate-pause" && json.arguments == ["a": [1]])
    }

    @Test(
        "what is no command is refused with its own words", arguments: [["x", "y"], ["x", "=1"], ["{"], ["{}"], []])
    func badMessages(words: [String]) {
        #expect(throws: CommandFailure.self) { try QMPMessage(words: words) }
    }

    @Test("columns are as wide as what is in them")
    func tables() {
        var table = TextTable([("NAME", .left), ("N", .right)])
        table.add(["a", "1000"])
        table.add(["long name", "7"])
        #expect(table.text == "NAME          N\na          1000\nlong name     7\n")
    }

    @Test("a VM that does not answer keeps its row")
    func silentVM() {
        let text = VMOverview.table([VMOverview(name: "web", processIdentifier: 12)])
        #expect(text.split(separator: "\n").last == "web    12  does not answer       ?      ?  ?")
    }
}
