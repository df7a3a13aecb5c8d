import Host
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("Channels are connected")
struct ChannelCallTests {
    private let path = temporaryPath("call-\(UInt64.random(in: 0...UInt64.max))")
    private let migration = MigrationIdentifier(high: 1, low: 2)

    /// Connects as many channels with so many threads that the host has. - Returns: the numbers they greeted with.
    private func connect(_ count: Int, threads: Int) throws -> [UInt8] {
        let listener = try Listener(on: .unix(path: path))
        defer { listener.close() }
        let greeted = Monitor<[UInt8]>([])
        _ = try HostThread(name: "greeted") {
            while let channel = try? listener.accept(),
                let bytes = try? channel.receive(exactly: MultifdGreeting.byteCount)
            {
                var buffer = ReceiveBuffer()
                buffer.append(bytes)
                guard let greeting = try? MultifdGreeting(from: &buffer) else { return }
                greeted.withLock { $0.append(greeting.channel) }
            }
        }
        let started = Monitor(0)
        var call = ChannelCall(count: count, migration: migration)
        call.startThread = { (body) throws(SystemError) in
            let number = started.withLock { started in
                started += 1
                return started
            }
            guard number <= threads else { throw SystemError("start", "a thread", code: 11) }
            _ = try HostThread(name: "multifd-conn", body)
        }
        let channels = try call.connect(to: .unix(path: path), connector: Connector(), cancel: CancelToken())
        #expect(channels.count == count)
        defer { for channel in channels { channel.cancel() } }
        return greeted.wait(deadline: .after(seconds: 10)) { $0.count == count ? $0.sorted() : nil } ?? []
    }

    @Test(
        "a host that has fewer threads than are wanted connects all channels, with those it has", arguments: [1, 3, 40])
    func fewThreads(threads: Int) throws {
        #expect(try connect(20, threads: threads) == Array(0..<20))
    }

    @Test("without any thread it fails, with the reason")
    func noThread() throws {
        #expect(throws: ChannelError.self) { try connect(2, threads: 0) }
    }
}
