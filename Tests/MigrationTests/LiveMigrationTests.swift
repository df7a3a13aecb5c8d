import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

@Suite("live migration", .serialized, .enabled(if: hasKVM, needsKVM))
struct LiveMigrationTests {
    @Test(
        "a running guest moves over every kind of socket and verifies where it arrives", .timeLimit(.minutes(10)),
        arguments: [("tcp", 4), ("unix", 2), ("fd", 1)])
    func sockets(kind: String, cpus: Int) async {
        await #expect(processExitsWith: .success) { [kind, cpus] in
            Child.run(seconds: 30) {
                let source = try Migrator.source("dirty,working-set=8M,fill=24M,random,rate=200M", cpus: cpus)
                let destination = try source.destination()
                let address: MigrationAddress
                switch kind {
                case "tcp": address = try destination.listen()
                case "unix":
                    address = .unix(path: temporaryPath("migration"))
                    try destination.acceptMigration(on: address)
                default:
                    let (here, there) = try Socket.pair()
                    source.keep(here, as: "out")
                    destination.keep(there, as: "in")
                    try destination.acceptMigration(on: .descriptor("in"))
                    address = .descriptor("out")
                }
                try source.migrate(to: address)
                try source.claimArrival(at: destination, "over \(kind)")
                // The process ends without closing its listener.
                if kind == "unix" { Descriptor.remove(temporaryPath("migration")) }
                claim(source.info().rule == .twoPhase, "the rule was \(source.info().rule.map { "\($0)" } ?? "none")")
            }
        }
    }

    @Test(
        "a guest is saved to a file or a command, and goes on from there", .timeLimit(.minutes(10)),
        arguments: ["file", "exec"])
    func oneWay(kind: String) async {
        await #expect(processExitsWith: .success) { [kind] in
            Child.run(seconds: 30) {
                let path = temporaryPath("saved")
                defer { Descriptor.remove(path) }
                let source = try Migrator.source("dirty,working-set=8M,fill=16M,rate=100M", cpus: 2)
                let isFile = kind == "file"
                try source.migrate(to: isFile ? .file(path: path, offset: 0) : .command("cat > \(path)"))
                try source.awaitEnd()
                claim(source.machine.runState == .postMigrate, "the source is \(source.machine.runState)")
                let destination = try source.destination()
                try destination.acceptMigration(on: isFile ? .file(path: path, offset: 0) : .command("cat \(path)"))
                try source.claimArrival(at: destination, "by \(kind)")
                Descriptor.remove(path)
            }
        }
    }

    @Test("memory that was never touched is not sent and stays a hole at the destination", .timeLimit(.minutes(10)))
    func holes() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("idle,fill=32M,words=512", mebibytes: 8 << 10)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "sparse")
                func touched(_ migrator: Migrator) throws -> UInt64 {
                    let block = migrator.machine.memory.blocks[0]
                    return try block.allocatedRuns(in: block.pages).reduce(0) {
                        $0 + $1.upperBound.value - $1.lowerBound.value
                    }
                }
                let pages = try touched(source)
                let ram = source.info().ram!
                // Pages the guest writes meanwhile go twice; the state and the stream's own words take some KiB.
                let limit = pages * 4096 * 101 / 100 + 256 << 10
                claim(ram.transferred <= limit, "\(ram.transferred) bytes were sent for \(pages) touched pages")
                claim(ram.normal >= 8192, "only \(ram.normal) pages were sent whole")
                // Huge pages may round up what arrives.
                let arrived = try touched(destination)
                claim(arrived <= pages + 16 * 512, "\(arrived) pages are allocated at the destination, \(pages) were")
            }
        }
    }

    @Test("a bandwidth limit is kept, and nothing else slows the migration down", .timeLimit(.minutes(10)))
    func bandwidth() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("idle,fill=40M,words=512", mebibytes: 64)
                let limit: UInt64 = 20 << 20
                var parameters = MigrationParameters()
                parameters.maxBandwidthBytesPerSecond = limit
                parameters.downtimeLimitMilliseconds = 20
                try source.set(parameters)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try waitFor("the first bytes") { (source.info().ram?.transferred ?? 0) > 1 << 20 }
                func sample() -> (at: UInt64, bytes: UInt64) {
                    (Clock.monotonicNanoseconds, source.info().ram?.transferred ?? 0)
                }
                let first = sample()
                Clock.sleep(nanoseconds: 1_500_000_000)
                // The time is read before the bytes: a pause between the two makes the rate look higher, so try again.
                var rate = Double.infinity
                var last = first
                for _ in 0..<5 where rate > Double(limit) * 1.05 {
                    last = sample()
                    rate = Double(last.bytes - first.bytes) * 1e9 / Double(last.at - first.at)
                }
                claim(source.info().status == .active, "the migration was over too early")
                claim(rate <= Double(limit) * 1.05, "\(UInt64(rate)) bytes/s are more than the limit of \(limit)")
                // A loaded machine is slower: what a late sender missed it may not send at once.
                claim(rate >= Double(limit) * 0.2, "\(UInt64(rate)) bytes/s are far below the limit of \(limit)")
                parameters.maxBandwidthBytesPerSecond = 0
                try source.set(parameters)
                try source.claimArrival(at: destination, "with a limit")
            }
        }
    }

    @Test("downtime is reported in named parts that add up to no less than what was seen", .timeLimit(.minutes(10)))
    func downtime() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("idle,fill=16M,heartbeat=1ms", cpus: 2)
                let destination = try source.destination()
                let stopped = Monitor<UInt64>(0)
                let resumed = Monitor<UInt64>(0)
                source.machine.observe {
                    if $0 == .stopped { stopped.withLock { $0 = Clock.monotonicNanoseconds } }
                }
                destination.machine.observe {
                    if $0 == .resumed { resumed.withLock { $0 = Clock.monotonicNanoseconds } }
                }
                let load = try (0..<3).map { _ in
                    try HostThread(name: "load") { while stopped.withLock({ $0 }) == 0 {} }
                }
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "idle")
                load.forEach { $0.join() }
                let downtime = source.info().downtime!
                let names = downtime.parts.map(\.name)
                claim(names == ["stop", "collect", "send", "state", "load", "start"], "the parts are \(names)")
                claim(downtime.parts.allSatisfy { $0.nanoseconds > 0 }, "a part took no time: \(downtime.parts)")
                let total = source.info().totalNanoseconds!
                claim(downtime.nanoseconds < total, "\(downtime.nanoseconds) ns of \(total) ns")
                // The guest stands still from before `stopped` is told until before `resumed` is.
                let seen = resumed.withLock { $0 } - stopped.withLock { $0 }
                claim(
                    downtime.nanoseconds + 20_000_000 >= seen,
                    "\(downtime.nanoseconds) ns reported, \(seen) ns were seen")
            }
        }
    }

    @Test("a guest that was paused arrives paused, and goes on when told to", .timeLimit(.minutes(10)))
    func paused() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("dirty,working-set=4M,fill=4M")
                source.machine.pause()
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.awaitEnd()
                try waitFor("the destination's end") { destination.isOver }
                claim(destination.machine.runState == .paused, "it arrived \(destination.machine.runState)")
                try destination.machine.resume()
                try destination.claimGuestRuns("after a paused arrival")
            }
        }
    }
}
