import Testing

@testable import QMP

@Suite struct MessageFramerTests {
    private func frames(_ text: String, limitBytes: Int = 1000) -> [MessageFramer.Frame] {
        var framer = MessageFramer(limitBytes: limitBytes)
        return framer.receive(text.utf8)
    }

    private func message(_ text: String) -> MessageFramer.Frame { .message(Array(text.utf8)) }

    @Test("several messages on a line, one over many lines, and bare words are each found whole")
    func boundaries() {
        #expect(
            frames("{\"a\":1}{}\t[{}] \"x\" 5 true\n") == [
                message("{\"a\":1}"), message("{}"), message("[{}]"), message("\"x\""), message("5"), message("true"),
            ])
        #expect(frames("{\n\"a\":\r\n[1,\n2]\n}") == [message("{\n\"a\":\r\n[1,\n2]\n}")])
        #expect(frames("5{}") == [message("5"), message("{}")])
        #expect(frames("{\"a\":1") == [])
    }

    @Test("brackets and quotes inside a string do not count")
    func strings() {
        let text = #"{"a":"}]\"{\\"}"#
        #expect(frames(text + text) == [message(text), message(text)])
    }

    @Test("the cut between two reads makes no difference, wherever it is")
    func splits() {
        let text = Array("{\"a\": \"\\\"é\"} [1]  x{}\n{\"b\": \"u\nv\"}\n{\"c\":]} {}\n \"s\" 12 {}".utf8)
        var whole = MessageFramer(limitBytes: 1000)
        let expected = whole.receive(text)
        #expect(expected.count == 11)
        for cut in text.indices {
            var framer = MessageFramer(limitBytes: 1000)
            #expect(framer.receive(text[..<cut]) + framer.receive(text[cut...]) == expected, "cut at \(cut)")
        }
    }

    @Test(
        "after a broken message the next line is a message again",
        arguments: [
            "{\"a\": \"b\n", "{\"execute\": 1]}}} \"x\n", "}\n", "GET / HTTP/1.1\n", "{\"a\": \u{7f}}\n", "\u{1b}[A\n",
            "{\"a\": \u{e9}}\n",
        ])
    func resynchronisation(broken: String) {
        let found = frames(broken + "{\"ok\":1}\n")
        #expect(found.count == 2)
        guard case .malformed = found.first else { return #expect(Bool(false), "\(found) begins with no error") }
        #expect(found.last == message("{\"ok\":1}"))
    }

    @Test("the byte 0xff ends whatever was begun, and what follows on the line counts")
    func restart() {
        for begun in ["", "{\"a\":", "{\"a\":\"x", "12"] {
            var framer = MessageFramer(limitBytes: 1000)
            let found = framer.receive(Array(begun.utf8) + [0xFF] + Array("{}".utf8))
            #expect(found == [.malformed("stray byte 0xff"), message("{}")])
        }
    }

    @Test("nesting beyond the limit is an error of that line")
    func nesting() {
        let found = frames(String(repeating: "[", count: MessageFramer.deepestNesting + 1) + "\n{}")
        #expect(found == [.malformed("nesting deeper than 128 levels"), message("{}")])
    }

    @Test("a message longer than the limit ends the stream; one as long as the limit does not")
    func limit() {
        #expect(frames("{\"a\":1}", limitBytes: 7) == [message("{\"a\":1}")])
        #expect(frames("{\"a\":12} {}", limitBytes: 7) == [.tooLarge(limitBytes: 7)])
        #expect(frames("{" + String(repeating: " ", count: 50), limitBytes: 7) == [.tooLarge(limitBytes: 7)])
    }

    @Test("random bytes never trap, and whatever comes out keeps the limits")
    func randomBytes() {
        let seed = UInt64.random(in: 0 ... .max)
        var state = seed
        let alphabet = Array("{}[]\",:\\ \n\r\ta1-\u{1}".utf8) + [0xFF, 0x80]
        var framer = MessageFramer(limitBytes: 64)
        for _ in 0..<200_000 {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            for frame in framer.receive([alphabet[Int(state >> 33) % alphabet.count]]) {
                switch frame {
                case .message(let text): #expect(!text.isEmpty && text.count <= 64, "seed \(seed)")
                case .malformed: break
                case .tooLarge: framer = MessageFramer(limitBytes: 64)
                }
            }
        }
    }
}
