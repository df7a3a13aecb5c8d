import Glibc
import MigrationStream
import Testing

/// Streams that the real QEMU wrote.
@Suite("Streams recorded from QEMU", .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct QEMUStreamTests {
    @Test("the stream of a machine without devices decodes strictly, all pages zero")
    func none() throws {
        let bytes = try QEMU.record(machine: "none")
        let ram = RAMBlockDescription(name: "ram", length: 16 << 20)
        let items = try decode(bytes, with: StreamDecoder(.load(blocks: [ram], catalogue: SectionCatalogue())))
        #expect(items.prefix(3) == [.header, .configuration(machine: "none"), .ramSetup([ram])])
        let zeroPages = items.filter { if case .zeroPage = $0 { true } else { false } }
        #expect(zeroPages.count == 4096)
        let devices = items.compactMap { item -> (String, [UInt8])? in
            if case .device(let head, let body) = item { (head.name, body) } else { nil }
        }
        #expect(devices.map(\.0) == ["timer", "globalstate"])
        #expect(devices.last.flatMap { GlobalState(body: $0.1) }?.runState == "prelaunch")
        guard case .vmDescription? = items.last else {
            Issue.record("the last item is \(String(describing: items.last))")
            return
        }
    }

    @Test("the stream of an ordinary PC is summarised to its end, sections as its own description lists them")
    func pc() throws {
        let bytes = try QEMU.record(machine: "pc")
        var summary = StreamSummary()
        for start in stride(from: 0, to: bytes.count, by: 65536) {
            try summary.feed(bytes[start..<min(bytes.count, start + 65536)])
        }
        try summary.finish()
        #expect(summary.isComplete)
        #expect(summary.blocks.first?.name == "pc.ram")
        let description = try #require(summary.vmDescription)
        #expect(summary.sections.count > 10)
        for section in summary.sections.dropFirst() {
            let entry = "{\"name\": \"\(section.name)\", \"instance_id\": \(section.instance), "
            #expect(description.contains(entry), "\(section.name)")
        }
        let listed = description.split(separator: "\"instance_id\": ").count - 1
        #expect(summary.sections.count == listed + 1)
    }

    @Test("a stream that we write, with data, zero pages and state, is loaded by QEMU")
    func accepted() throws {
        let ram = RAMBlockDescription(name: "ram", length: 16 << 20)
        let state = GlobalState(runState: "paused").section
        let layout = SectionLayout.fixed(byteCount: GlobalState.byteCount)
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "none")
        writer.ramSetup(id: 2, blocks: [ram])
        var records = RAMRecordEncoder(blocks: [ram])
        for isFinal in [false, true] {
            writer.ramRound(final: isFinal, id: 2)
            var pages: [UInt8] = []
            for index in 0..<8 as Range<UInt64> {
                records.zeroPage(block: 0, offset: index * 8192, into: &pages)
                records.page(block: 0, offset: index * 8192 + 4096, into: &pages)
                pages += Sample.page(UInt8(index))
            }
            writer.append(pages)
            writer.ramSectionEnd(id: 2)
        }
        writer.deviceSection(state, id: 3, layout: layout)
        writer.endOfStream()
        writer.vmDescription(VMDescription.json(for: [(state, layout)]))
        #expect(try QEMU.loads(writer.bytes, machine: "none"))
        let broken = Array(writer.bytes.prefix(9000))
        #expect(try !QEMU.loads(broken, machine: "none"))
    }
}

private enum QEMU {
    static let program = "qemu-system-x86_64"

    static let isInstalled = unsafe system("command -v \(program) >/dev/null 2>&1") == 0

    struct Failure: Error { let status: Int32 }

    /// A new file, removed when `body` is done with it.
    private static func withFile<Value>(_ body: (_ descriptor: Int32, _ path: String) throws -> Value) throws -> Value {
        var name = Array("/tmp/godwit-stream-XXXXXX".utf8CString)
        let descriptor = unsafe mkstemp(&name)
        guard descriptor >= 0 else { throw Failure(status: errno) }
        defer { close(descriptor) }
        let path = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        defer { unsafe unlink(path) }
        return try body(descriptor, path)
    }

    private static func command(_ machine: String) -> String {
        "timeout 30 \(program) -M \(machine) -m 16 -nodefaults -display none -S -qmp stdio"
    }

    /// The bytes that a machine of 16 MiB which never ran migrates to `exec:`.
    static func record(machine: String) throws -> [UInt8] {
        try withFile { descriptor, path in
            // The stream's description ends with "}]}": then QEMU is told to quit, so nothing is left running.
            let script = """
                { echo '{"execute":"qmp_capabilities"}'
                  echo '{"execute":"migrate","arguments":{"uri":"exec:cat>\(path)"}}'
                  for i in $(seq 100); do
                    sleep 0.1; tail -c 3 \(path) | grep -q '}]}' && break
                  done
                  echo '{"execute":"quit"}'; } | \(command(machine)) >/dev/null
                """
            let status = unsafe system(script)
            guard status == 0 else { throw Failure(status: status) }
            var bytes: [UInt8] = []
            var piece = [UInt8](repeating: 0, count: 1 << 16)
            while true {
                let count = unsafe read(descriptor, &piece, piece.count)
                guard count > 0 else { return bytes }
                bytes += piece.prefix(count)
            }
        }
    }

    /// Whether a waiting QEMU says that it loaded these bytes.
    static func loads(_ bytes: [UInt8], machine: String) throws -> Bool {
        try withFile { descriptor, path in
            guard unsafe write(descriptor, bytes, bytes.count) == bytes.count else { throw Failure(status: errno) }
            let script = """
                { echo '{"execute":"qmp_capabilities"}'
                  for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo '{"execute":"query-migrate"}'; done
                  echo '{"execute":"quit"}'; } |
                \(command(machine)) -incoming 'exec:cat \(path)' 2>/dev/null | grep -q '"status": "completed"'
                """
            return unsafe system(script) == 0
        }
    }
}
