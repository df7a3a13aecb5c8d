import Host
import Testing

@testable import QMP

@Suite struct JSONTests {
    @Test(
        "a value survives being written and read",
        arguments: [
            "null", "true", "0", "-9223372036854775808", "9223372036854775807", "9223372036854775808",
            "18446744073709551615", "9007199254740993", "1.5", "-2.5e-07", "\"\"", "\"a\\\"\\\\b/\\u0000\\u001f é 🐦\"",
            "[]", "{}", "[1,[2,{\"a\":[]}],null]", "{\"a\":1,\"b\":{\"c\":false}}",
        ])
    func roundTrip(text: String) throws {
        let value = try JSON(parsing: text.utf8)
        #expect(value.description == text)
        #expect(try JSON(parsing: value.encoded()) == value)
    }

    @Test("integers beyond 64 bits become doubles, as in QEMU, instead of wrapping")
    func hugeNumbers() throws {
        #expect(try JSON(parsing: "18446744073709551616".utf8) == .double(18446744073709551616))
        #expect(try JSON(parsing: "-9223372036854775809".utf8) == .double(-9223372036854775808))
        #expect(JSON(UInt64.max) == .unsigned(.max))
        #expect(JSON(UInt64(5)) == .integer(5))
        #expect(JSON(UInt64.max).integerValue(as: UInt64.self) == .max)
        #expect(JSON(UInt64.max).integerValue(as: Int64.self) == nil)
        #expect(JSON(-1).integerValue(as: UInt8.self) == nil)
    }

    @Test(
        "text that is not JSON is an error with a reason",
        arguments: [
            "", " ", "tru", "01", "-", "1e400", "{\"a\" 1}", "{a:1}", "[1", "\"\\ud800\"", "\"\\x\"",
            "{\"a\":\"b\u{1}\"}",
            "{} {}", "{'a':1}",
        ])
    func broken(text: String) {
        let error = #expect(throws: JSONError.self) { try JSON(parsing: text.utf8) }
        #expect(error?.description.isEmpty == false)
    }

    @Test(
        "bad UTF-8 is an error wherever it stands", arguments: [[0x22, 0xFF, 0x22], [0x22, 0xED, 0xA0, 0x80, 0x22]])
    func badText(bytes: [UInt8]) {
        #expect(throws: JSONError.self) { try JSON(parsing: bytes) }
        #expect(throws: JSONError.self) { try JSON(parsing: Array("{\"a\":".utf8) + bytes + [0x7D]) }
    }

    @Test("nesting without end is an error, and nesting to the limit fits the stack of a QMP thread")
    func nesting() throws {
        @Sendable func nested(_ levels: Int) -> String {
            String(repeating: "[", count: levels) + String(repeating: "]", count: levels)
        }
        #expect(throws: JSONError.self) { try JSON(parsing: nested(100_000).utf8) }
        let thread = try HostThread(name: "deep", stackBytes: 2 << 20) {
            let text = nested(MessageFramer.deepestNesting)
            let value = try? JSON(parsing: text.utf8)
            #expect(value?.description == text)
        }
        thread.join()
    }

    @Test("a number that is not finite is written as null")
    func notFinite() {
        #expect(JSON.array([.double(.infinity), .double(.nan)]).description == "[null,null]")
    }

    @Test("members are written in one order, whatever the order they were given in")
    func memberOrder() {
        let value: JSON = ["zeta": 1, "alpha": [:], "mid": nil]
        #expect(value.description == "{\"alpha\":{},\"mid\":null,\"zeta\":1}")
    }
}
