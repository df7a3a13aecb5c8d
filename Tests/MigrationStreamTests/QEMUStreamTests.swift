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
}

private enum QEMU {
    static let program = "qemu-system-x86_64"

    static let isInstalled = unsafe system("command -v \(program) >/dev/null 2>&1") == 0

    struct Failure: Error { let status: Int32 }

    /// The bytes that a machine of 16 MiB which never ran migrates to `exec:`.
    static func record(machine: String) throws -> [UInt8] {
        var name = Array("/tmp/godwit-stream-XXXXXX".utf8CString)
        let descriptor = unsafe mkstemp(&name)
        guard descriptor >= 0 else { throw Failure(status: errno) }
        defer { close(descriptor) }
        let path = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        defer { unsafe unlink(path) }
        // The stream's description ends with "}]}": then QEMU is told to quit, so nothing is left running.
        let script = """
            { echo '{"execute":"qmp_capabilities"}'
              echo '{"execute":"migrate","arguments":{"uri":"exec:cat>\(path)"}}'
              for i in $(seq 100); do
                sleep 0.1; tail -c 3 \(path) | grep -q '}]}' && break
              done
              echo '{"execute":"quit"}'; } |
            timeout 30 \(program) -M \(machine) -m 16 -nodefaults -display none -S -qmp stdio >/dev/null
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
