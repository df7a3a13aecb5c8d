import GuestPrograms
import Testing

@Suite("Guest descriptions")
struct GuestProgramParsingTests {
    @Test("a name alone takes the defaults")
    func defaults() throws {
        let guest = try GuestProgram(parsing: "dirty")
        #expect(guest.kind == .dirty)
        #expect(guest.fill == .all)
        #expect(guest.wordsPerPage == 2)
        #expect(guest.heartbeatNanoseconds == 10_000_000)
        #expect(guest.workingSetBytes == nil)
        #expect(guest.rateBytesPerSecond == nil)
        #expect(guest.order == .sequential)
        #expect(try GuestProgram(parsing: "probe").order == .random)
    }

    @Test("every parameter arrives in its field")
    func everyParameter() throws {
        let guest = try GuestProgram(
            parsing:
                "probe,fill=4G,words=512,heartbeat=2ms,seed=0xff,working-set=1G,rate=800M,sequential,stride=3,write")
        #expect(guest.fill == .bytes(4 << 30))
        #expect(guest.wordsPerPage == 512)
        #expect(guest.heartbeatNanoseconds == 2_000_000)
        #expect(guest.seed == 255)
        #expect(guest.workingSetBytes == 1 << 30)
        #expect(guest.rateBytesPerSecond == 800 << 20)
        #expect(guest.order == .sequential)
        #expect(guest.stridePages == 3)
        #expect(guest.probeWrites)
    }

    @Test(
        "sizes and times take their suffixes",
        arguments: [
            ("idle,fill=8192", GuestProgram.Fill.bytes(8192)), ("idle,fill=64K", .bytes(64 << 10)),
            ("idle,fill=3M", .bytes(3 << 20)), ("idle,fill=2T", .bytes(2 << 40)), ("idle,fill=0", .none),
            ("idle,fill=none", .none), ("idle,fill=all", .all),
        ])
    func sizes(text: String, fill: GuestProgram.Fill) throws {
        #expect(try GuestProgram(parsing: text).fill == fill)
    }

    @Test("a rate of 0 is no limit, a heartbeat of 0 is none")
    func zeroes() throws {
        #expect(try GuestProgram(parsing: "dirty,rate=0").rateBytesPerSecond == nil)
        #expect(try GuestProgram(parsing: "dirty,heartbeat=0").heartbeatNanoseconds == 0)
        #expect(try GuestProgram(parsing: "dirty,heartbeat=250us").heartbeatNanoseconds == 250_000)
        #expect(try GuestProgram(parsing: "dirty,heartbeat=1s").heartbeatNanoseconds == 1_000_000_000)
    }

    @Test(
        "an unknown guest is refused with the names there are",
        arguments: ["", "Dirty", "dirty2", " dirty", "=", "random"])
    func unknownGuest(text: String) throws {
        let error = #expect(throws: GuestProgramError.self) { try GuestProgram(parsing: text) }
        #expect(error == .unknownGuest(name: text))
        #expect(error.map(String.init(describing:))?.hasSuffix("possible are idle, dirty, probe") == true)
    }

    @Test(
        "an unknown parameter is refused with those the guest has",
        arguments: [
            "idle,rate=1M", "idle,random", "dirty,write", "dirty,", "dirty,colour=red", "dirty,Fill=all", "dirty,=1",
        ])
    func unknownParameter(text: String) throws {
        let error = #expect(throws: GuestProgramError.self) { try GuestProgram(parsing: text) }
        guard case .unknownParameter(let guest, let parameter, let possible) = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        #expect(text == "\(guest),\(parameter)")
        #expect(possible.contains("fill=SIZE|all|none"))
        #expect(possible.contains("random") == (guest != "idle"))
    }

    @Test(
        "a value of the wrong form is refused by name",
        arguments: [
            "dirty,fill=", "dirty,fill", "dirty,fill=5", "dirty,fill=1X", "dirty,fill=-4K", "dirty,fill=+4K",
            "dirty,fill=1.5G",
            "dirty,fill=99999999999999999999T", "dirty,fill=16777216T", "dirty,words=0", "dirty,words=513",
            "dirty,words=two",
            "dirty,heartbeat=5", "dirty,heartbeat=ms", "dirty,heartbeat=2h", "dirty,heartbeat=2000000h",
            "dirty,seed=0x",
            "dirty,seed=18446744073709551616", "dirty,working-set=0", "dirty,working-set=1", "dirty,rate=fast",
            "dirty,rate=9999T", "dirty,stride=0", "dirty,stride=", "dirty,random=1", "dirty,random=", "dirty,seed=1=2",
            "dirty,heartbeat=3601s",
        ])
    func badValue(text: String) throws {
        let error = #expect(throws: GuestProgramError.self) { try GuestProgram(parsing: text) }
        guard case .badValue("dirty", let parameter, _, let expected) = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        #expect(text.hasPrefix("dirty,\(parameter)"))
        #expect(!expected.isEmpty)
    }

    @Test(
        "a parameter given twice, or with its opposite, is refused",
        arguments: ["dirty,words=1,words=1", "dirty,random,sequential", "dirty,random,random", "probe,read,write"])
    func repeated(text: String) {
        let error = #expect(throws: GuestProgramError.self) { try GuestProgram(parsing: text) }
        guard case .repeatedParameter = error else {
            Issue.record("\(String(describing: error))")
            return
        }
    }
}
