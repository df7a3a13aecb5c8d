import CommandLineKit
import Glibc
import Host
import QMP

/// `iperf3` with one stream and writes of 1 MiB over loopback.
struct Iperf {
    let folder: String

    static var isInstalled: Bool {
        guard let null = try? Descriptor.open("/dev/null", O_RDWR),
            let child = try? ChildProcess(["iperf3", "--version"], input: null, output: null, error: null)
        else { return false }
        return child.wait(deadline: .after(seconds: 5))?.isSuccess == true
    }

    /// - Throws: `CommandFailure` with its last words.
    func measure(byteCount: Int) throws -> StreamRate {
        let port = try "\(Socket.localPort(of: Socket.listen(host: "127.0.0.1", port: "0")) ?? 0)"
        let server = try start(["-s", "-1", "-B", "127.0.0.1", "-p", port], output: "server")
        defer { server.end(graceMilliseconds: 100) }
        let deadline = Deadline.after(seconds: 60)
        while true {
            let client = try start(
                ["-c", "127.0.0.1", "-p", port, "-l", "1M", "-n", "\(byteCount)", "-J"], output: "client")
            defer { client.end(graceMilliseconds: 100) }
            let status = client.wait(deadline: deadline)
            let report = try? JSON(parsing: Descriptor.contents(of: "\(folder)/client", limit: 16 << 20))
            if status?.isSuccess == true, let report, let rate = Self.rate(report) { return rate }
            // It may not listen yet.
            guard server.poll() == nil, !deadline.hasPassed else {
                throw CommandFailure("iperf3: \(report?["error"]?.stringValue ?? "it did not end well")")
            }
            Clock.sleep(nanoseconds: 20_000_000)
        }
    }

    private static func rate(_ report: JSON) -> StreamRate? {
        guard let bits = report["end"]?["sum_received"]?["bits_per_second"]?.doubleValue, bits > 0 else { return nil }
        return StreamRate(gigabytesPerSecond: bits / 8e9)
    }

    private func start(_ arguments: [String], output: String) throws -> ChildProcess {
        try ChildProcess(
            ["iperf3"] + arguments, input: Descriptor.open("/dev/null", O_RDONLY),
            output: Descriptor.create("\(folder)/\(output)"), error: Descriptor.create("\(folder)/\(output)-errors"))
    }
}

/// What `iperf3` does, where it is not installed: write(2) and read(2) with 1 MiB, from and to one buffer each.
enum BareStream {
    private static let blockBytes = 1 << 20

    static func measure(byteCount: Int) throws -> StreamRate {
        let (out, into) = try LoopbackPair.connect()
        return try StreamRate.measuring(byteCount) {
            let sender = try Background {
                let block = [UInt8](repeating: 0x5a, count: blockBytes)
                var left = byteCount
                while left > 0 { left -= try out.write(block.prefix(left)) ?? 0 }
            }
            let buffer = try Mapping(anonymousByteCount: blockBytes)
            var left = byteCount
            while left > 0 {
                let count = try unsafe buffer.withMutableBytes(at: 0, count: blockBytes) {
                    (room) throws(SystemError) in try unsafe into.read(into: room)
                }
                guard let count, count > 0 else { throw SystemError("read", "loopback", code: ECONNRESET) }
                left -= count
            }
            try sender.value()
        }
    }
}

/// Two ends of a TCP connection over loopback, both blocking.
enum LoopbackPair {
    static func connect() throws -> (Descriptor, Descriptor) {
        let listener = try Socket.listen(host: "127.0.0.1", port: "0")
        let port = Socket.localPort(of: listener).map(String.init) ?? ""
        let out = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 10))
        guard let into = try Socket.accept(listener, deadline: .after(seconds: 10)) else {
            throw SystemError("accept on", "127.0.0.1:\(port)", code: ETIMEDOUT)
        }
        for end in [out, into] { try end.setNonBlocking(false) }
        return (out, into)
    }
}
