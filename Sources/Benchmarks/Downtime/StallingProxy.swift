import Glibc
import Host
import Synchronization

/// When a network stalls: intervals on the clock, drawn from a seed. Nothing passes while one lasts.
struct StallSchedule {
    /// Between the end of one and the start of the next, on average.
    let meanGapNanoseconds: Double
    /// Lengths, each order of magnitude as likely as the next.
    let shortestNanoseconds: Double
    let longestNanoseconds: Double
    private var random: SeededNumbers
    private var start: UInt64
    private var end: UInt64

    init(meanGapNanoseconds: Double, shortest: Double, longest: Double, seed: UInt64, from now: UInt64) {
        self.meanGapNanoseconds = meanGapNanoseconds
        shortestNanoseconds = shortest
        longestNanoseconds = longest
        random = SeededNumbers(seed: seed)
        (start, end) = (now, now)
        draw()
    }

    private mutating func draw() {
        let gap = -log(1 - Double.random(in: 0..<1, using: &random)) * meanGapNanoseconds
        let span = log(longestNanoseconds / shortestNanoseconds)
        let length = shortestNanoseconds * exp(Double.random(in: 0..<1, using: &random) * span)
        start = end + UInt64(gap)
        end = start + UInt64(length)
    }

    /// - Returns: how long a byte that wants to pass now must wait.
    mutating func delay(at now: UInt64) -> UInt64 {
        while end <= now { draw() }
        return now >= start ? end - now : 0
    }
}

/// A TCP proxy between a source and its destination that holds bytes for random times, in each direction by a schedule of its own.
final class StallingProxy: Sendable {
    private let listener: Descriptor
    private let wake: EventDescriptor
    private let port: String
    private let sockets = Mutex<[Descriptor]>([])
    private let counters = Mutex<(stalls: Int, nanoseconds: UInt64)>((0, 0))
    private let schedules: (forward: StallSchedule, backward: StallSchedule)

    /// - Parameter target: as `tcp:127.0.0.1:PORT`.
    init(to target: String, forward: StallSchedule, backward: StallSchedule) throws {
        listener = try Socket.listen(host: "127.0.0.1", port: "0")
        wake = try EventDescriptor()
        port = String(target.split(separator: ":").last ?? "")
        schedules = (forward, backward)
        try HostThread.detached(name: "stall-accept") { [self] in accept() }
    }

    var uri: String { "tcp:127.0.0.1:\(Socket.localPort(of: listener) ?? 0)" }

    /// How often bytes were held, and for how long together.
    var held: (stalls: Int, nanoseconds: UInt64) { counters.withLock { $0 } }

    func close() {
        wake.raise()
        sockets.withLock { sockets in
            sockets.forEach(Socket.shutdown)
            sockets = []
        }
    }

    private func accept() {
        while let source = try? Socket.accept(listener, wake: wake) {
            guard let destination = try? Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
            else {
                Socket.shutdown(source)
                continue
            }
            sockets.withLock { $0 += [source, destination] }
            let (forward, backward) = schedules
            do throws(SystemError) {
                try HostThread.detached(name: "stall-forward") { [self] in pass(source, destination, forward) }
                try HostThread.detached(name: "stall-back") { [self] in pass(destination, source, backward) }
            } catch {
                // Half a proxy would look like a stall: the migration is to fail instead, and to say so.
                Socket.shutdown(source)
                Socket.shutdown(destination)
            }
        }
    }

    private func pass(_ from: Descriptor, _ to: Descriptor, _ given: StallSchedule) {
        HostThread.sleepExactly()
        var schedule = given
        while let bytes = try? from.read(upTo: 1 << 18), !bytes.isEmpty {
            let delay = schedule.delay(at: Clock.monotonicNanoseconds)
            if delay > 0 {
                counters.withLock { $0 = ($0.stalls + 1, $0.nanoseconds + delay) }
                Clock.sleep(nanoseconds: delay)
            }
            guard (try? to.writeAll(bytes)) != nil else { break }
        }
        try? Socket.finishSending(to)
    }
}
