import Host
import Migration

/// How well `max-bandwidth` is kept: a migration's rounds under several limits, and when each write of theirs was done.
struct PacedRounds {
    private static let megabytesPerSecond: [UInt64] = [10, 100, 500, 1000]
    private static let second: UInt64 = 1_000_000_000
    /// The first second does not count; windows of a second begin anywhere in what is left.
    private static let runNanoseconds: UInt64 = 2_700_000_000
    private static let burstWindow: UInt64 = 10_000_000

    /// By rate, of each run.
    private var errors: [[Double]] = Self.megabytesPerSecond.map { _ in [] }
    private var excesses: [[Double]] = Self.megabytesPerSecond.map { _ in [] }
    private var bursts: [[Double]] = Self.megabytesPerSecond.map { _ in [] }

    static func runs(_ options: BenchmarkOptions) -> Int { options.isQuick ? 1 : 3 }

    mutating func measure(_ options: BenchmarkOptions, _ memory: TrialMemory) throws {
        for (index, rate) in Self.megabytesPerSecond.enumerated() {
            guard options.only.map({ "pacing \(rate) MB/s".contains($0) }) ?? true else { continue }
            try options.checkInterruption()
            let writes = try Self.writes(at: rate * 1_000_000, memory)
            errors[index].append(writes.worstError(window: Self.second, after: Self.second))
            excesses[index].append(writes.worstExcess(window: Self.second, after: Self.second))
            bursts[index].append(writes.mostMilliseconds(in: Self.burstWindow, after: Self.second))
        }
    }

    private static func writes(at rate: UInt64, _ memory: TrialMemory) throws -> PacedWrites {
        let trial = RoundTrial(from: memory.source, to: memory.target, verifies: false)
        return try ChannelStream.withPair { out, into in
            let sender = try Background {
                var writes = PacedWrites(bytesPerSecond: rate)
                let end = Clock.monotonicNanoseconds + runNanoseconds
                try trial.send(over: out, rounds: .max, bytesPerSecond: rate) { bytes in
                    let now = Clock.monotonicNanoseconds
                    writes.list.append((now, bytes))
                    return now > end
                }
                return writes
            }
            try trial.receive(from: into)
            return try sender.value()
        }
    }

    /// The worst of a run's rates, and of runs the one in the middle.
    var error: Double { worst(errors) }
    /// The same, too much only: what a host that keeps the sender waiting cannot be blamed for.
    var excess: Double { worst(excesses) }
    var burstMilliseconds: Double { worst(bursts) }

    private func worst(_ values: [[Double]]) -> Double {
        let measured = values.filter { !$0.isEmpty }
        guard let runs = measured.map(\.count).min() else { return .nan }
        return (0..<runs).map { run in measured.map { $0[run] }.max() ?? .nan }.median ?? .nan
    }

    var cells: [BenchmarkCell] {
        Self.megabytesPerSecond.indices.filter { !errors[$0].isEmpty }.map { index in
            BenchmarkCell(
                [("stream", "pacing"), ("by", "\(Self.megabytesPerSecond[index]) MB/s")],
                [
                    (name: "worst-error", samples: errors[index]), (name: "worst-excess", samples: excesses[index]),
                    (name: "most-in-10-ms", samples: bursts[index]),
                ])
        }
    }
}

/// Writes and when each was done, in order.
struct PacedWrites: Sendable {
    let bytesPerSecond: UInt64
    var list: [(at: UInt64, bytes: UInt64)] = []

    init(bytesPerSecond: UInt64) { self.bytesPerSecond = bytesPerSecond }

    /// How far any window of that length is from what the rate allows, as a part of it; windows in the first `skipped` do not count.
    func worstError(window: UInt64, after skipped: UInt64) -> Double {
        guard let (least, most) = extremes(window: window, after: skipped) else { return .nan }
        let right = Double(bytesPerSecond) * Double(window) / 1e9
        return max(Double(most) - right, right - Double(least)) / right
    }

    /// How far the fullest window is above what the rate allows; less than 0: it is below.
    func worstExcess(window: UInt64, after skipped: UInt64) -> Double {
        guard let (_, most) = extremes(window: window, after: skipped) else { return .nan }
        return Double(most) * 1e9 / (Double(bytesPerSecond) * Double(window)) - 1
    }

    /// The most that was written in a window of that length, as time at the rate, in milliseconds.
    func mostMilliseconds(in window: UInt64, after skipped: UInt64) -> Double {
        extremes(window: window, after: skipped).map { Double($0.most) * 1e3 / Double(bytesPerSecond) } ?? .nan
    }

    /// The least and the most bytes in a window, over all windows. The most begin with a write, the least just behind one.
    private func extremes(window: UInt64, after skipped: UInt64) -> (least: UInt64, most: UInt64)? {
        guard let first = list.first, let end = list.last?.at else { return nil }
        var result: (least: UInt64, most: UInt64)?
        var (last, sum) = (0, UInt64(0))
        for write in list {
            while last < list.count, list[last].at < write.at + window {
                sum += list[last].bytes
                last += 1
            }
            if write.at >= first.at + skipped, write.at + window <= end {
                // A window that begins just behind this write goes on to just behind the same time later.
                var behind = sum - write.bytes
                if last < list.count, list[last].at == write.at + window { behind += list[last].bytes }
                result = (min(result?.least ?? .max, behind), max(result?.most ?? 0, sum))
            }
            sum -= write.bytes
        }
        return result
    }
}
