import Host
import TestSupport
import Testing

@testable import Migration

/// What a sender did on a clock of its own: moments and bytes.
private struct PacedRun {
    var sent: [(at: UInt64, bytes: UInt64)] = []

    /// The most and least bytes in any window of that length, without the ends.
    func extremes(window: UInt64, from start: UInt64, to end: UInt64) -> (least: UInt64, most: UInt64) {
        var (first, last) = (0, 0)
        var (sum, least, most): (UInt64, UInt64, UInt64) = (0, .max, 0)
        // Windows begin at each write, and just behind it.
        while first < sent.count {
            while last < sent.count, sent[last].at < sent[first].at + window {
                sum += sent[last].bytes
                last += 1
            }
            if sent[first].at >= start, sent[first].at + window <= end {
                most = max(most, sum)
                least = min(least, sum - sent[first].bytes)
            }
            sum -= sent[first].bytes
            first += 1
        }
        return (least, most)
    }
}

@Suite("Pacer")
struct PacerTests {
    private static let second: UInt64 = 1_000_000_000

    /// - Parameter lateness: how much too late each sleep ends, in nanoseconds.
    private func run(
        _ rate: UInt64, seconds: UInt64, senders: Int = 1, lateness: (inout SeededRandom) -> UInt64
    ) -> PacedRun {
        var random = SeededRandom(seed: rate)
        let pacer = Pacer(bytesPerSecond: rate)
        var run = PacedRun()
        var next = [UInt64](repeating: Self.second, count: senders)
        while let sender = next.indices.min(by: { next[$0] < next[$1] }), next[sender] < (seconds + 1) * Self.second {
            let now = next[sender]
            let bytes = UInt64(pacer.batchBytes(most: 2 << 20)) + 40
            run.sent.append((now, bytes))
            // The write takes its time, too.
            let wait = pacer.sent(bytes, at: now)
            next[sender] = now + 2_000 + (wait > 0 ? wait + lateness(&random) : 0)
        }
        return run
    }

    @Test(
        "any second holds the rate within 5 %, whatever the scheduler does", arguments: [10, 100, 500] as [UInt64],
        1...4)
    func anySecond(megabytes: UInt64, senders: Int) {
        let rate = megabytes * 1_000_000
        // 50 us always, 3 ms often, 25 ms now and then.
        let run = run(rate, seconds: 6, senders: senders) { random in
            let dice = random.next() % 1000
            return 50_000 + (dice < 50 ? random.next() % 3_000_000 : 0) + (dice == 999 ? 25_000_000 : 0)
        }
        let (least, most) = run.extremes(window: Self.second, from: 2 * Self.second, to: 7 * Self.second)
        #expect(most <= rate * 105 / 100, "\(most) bytes in a second at \(rate)")
        #expect(least >= rate * 95 / 100, "\(least) bytes in a second at \(rate)")
    }

    @Test("what a late sender missed comes without a burst of more than a few milliseconds' worth")
    func bursts() {
        let rate: UInt64 = 100_000_000
        let run = run(rate, seconds: 4) { random in random.next() % 200 == 0 ? 30_000_000 : 0 }
        for (window, allowed) in [(1_000_000, 4_500_000), (10_000_000, 16_000_000), (50_000_000, 66_000_000)]
            as [(UInt64, UInt64)]
        {
            let most = run.extremes(window: window, from: Self.second, to: 5 * Self.second).most
            #expect(most <= rate / 1000 * (allowed / 1_000_000) + rate / 1000, "\(most) bytes in \(window) ns")
        }
    }

    @Test("a changed rate counts at once, in both directions, and a sender that waits is woken by it")
    func change() throws {
        let pacer = Pacer(bytesPerSecond: 1000)
        let wait = pacer.sent(4096, at: Self.second)
        #expect(wait > 3 * Self.second)
        let changer = try HostThread(name: "changer") {
            Clock.sleep(nanoseconds: 20_000_000)
            pacer.bytesPerSecond = 1_000_000_000
        }
        let start = Clock.monotonicNanoseconds
        pacer.wait(wait)
        #expect(Clock.monotonicNanoseconds - start < 2 * Self.second)
        changer.join()
        #expect(pacer.sent(1_000_000, at: 2 * Self.second) <= 1_000_000)
        pacer.bytesPerSecond = 0
        #expect(pacer.sent(1 << 40, at: 2 * Self.second) == 0 && pacer.batchBytes(most: 77777) == 77777)
        #expect(Pacer.unlimited.sent(1 << 40, at: 0) == 0)
    }

    @Test(
        "over a socket the reader counts the rate in each second", .timeLimit(.minutes(10)),
        arguments: [10, 100, 500] as [UInt64])
    func overSocket(megabytes: UInt64) throws {
        let rate = megabytes * 1_000_000
        let (here, there) = try Socket.pair()
        let pacer = Pacer(bytesPerSecond: rate)
        let end = Deadline.after(milliseconds: 4200)
        let sender = try HostThread(name: "paced") {
            HostThread.sleepExactly()
            let batch = [UInt8](repeating: 1, count: pacer.batchBytes(most: 2 << 20))
            while !end.hasPassed, (try? here.writeAll(batch)) != nil {
                pacer.wait(pacer.sent(UInt64(batch.count), at: Clock.monotonicNanoseconds))
            }
            try? Socket.finishSending(here)
        }
        var seconds: [Double] = []
        // The first second begins when the connection has settled.
        var (began, bytes): (UInt64, UInt64) = (Clock.monotonicNanoseconds + Self.second / 10, 0)
        while let piece = try there.read(upTo: 1 << 20), !piece.isEmpty {
            let now = Clock.monotonicNanoseconds
            guard now >= began else { continue }
            bytes += UInt64(piece.count)
            guard now >= began + Self.second else { continue }
            seconds.append(Double(bytes) * 1e9 / Double(now - began) / Double(rate))
            (began, bytes) = (now, 0)
        }
        sender.join()
        let sorted = seconds.sorted()
        let median = sorted.isEmpty ? 0 : sorted[sorted.count / 2]
        print("pacing: \(megabytes) MB/s, seconds against the rate: \(seconds), median \(median)")
        #expect(seconds.count >= 3)
        // A busy machine may leave the sender or the reader out for a second; faster it must never be.
        // 500 MB/s take most of a processor, which the other tests may not leave: there the simulated clock speaks for the lower bound.
        #expect(median > (megabytes < 500 ? 0.90 : 0.3) && median < 1.05)
        #expect((sorted.last ?? 9) < 1.05)
    }
}
