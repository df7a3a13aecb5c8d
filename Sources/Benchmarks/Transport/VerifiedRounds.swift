import GuestMemory
import Host
import Migration
import Transport

/// Guest memory full of pages that are not alike, and memory for them to arrive in.
struct TrialMemory: Sendable {
    let source: GuestMemory
    let target: GuestMemory

    init(_ pages: GuestPages) throws {
        let byteCount = pages.source.byteCount
        source = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: UInt64(byteCount))])
        target = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: UInt64(byteCount))])
        source.blocks[0].mapping.copy(from: pages.source, at: 0, count: byteCount)
        try target.blocks[0].mapping.advise(.populate)
    }
}

/// What `x-verify` costs a migration's rounds: the same pages with digests and without, side by side in each run.
struct VerifiedRounds {
    private struct Sample {
        let gigabytesPerSecond: Double
        let sendSecondsPerGigabyte: Double
        let receiveSecondsPerGigabyte: Double

        var processor: Double { sendSecondsPerGigabyte + receiveSecondsPerGigabyte }
    }
    private var verified: [Sample] = []
    private var plain: [Sample] = []

    /// Which comes first changes with every run.
    mutating func measure(_ options: BenchmarkOptions, _ memory: TrialMemory, byteCount: Int) throws {
        guard options.only.map({ "rounds".contains($0) }) ?? true else { return }
        let verifiedFirst = verified.count % 2 == 0
        for verifies in [verifiedFirst, !verifiedFirst] {
            try options.checkInterruption()
            let sample = try Self.sample(memory, byteCount: byteCount, verifies: verifies)
            if verifies { verified.append(sample) } else { plain.append(sample) }
        }
    }

    private static func sample(_ memory: TrialMemory, byteCount: Int, verifies: Bool) throws -> Sample {
        let trial = RoundTrial(from: memory.source, to: memory.target, verifies: verifies)
        let rounds = max(1, byteCount / Int(memory.source.byteCount))
        return try ChannelStream.withPair { out, into in
            let start = Clock.monotonicNanoseconds
            let sender = try Background {
                try trial.send(over: out, rounds: rounds)
                return Clock.threadCPUNanoseconds
            }
            let before = Clock.threadCPUNanoseconds
            try trial.receive(from: into)
            let received = Clock.threadCPUNanoseconds - before
            let elapsed = Clock.monotonicNanoseconds - start
            let bytes = Double(rounds) * Double(memory.source.byteCount)
            return Sample(
                gigabytesPerSecond: bytes / Double(elapsed),
                sendSecondsPerGigabyte: Double(try sender.value()) / bytes,
                receiveSecondsPerGigabyte: Double(received) / bytes)
        }
    }

    /// The part of the throughput that digests cost.
    var overhead: Double {
        1 - (zip(verified, plain).map { $0.gigabytesPerSecond / $1.gigabytesPerSecond }.median ?? .nan)
    }

    /// By how much the processor time of both ends grows.
    var processorOverhead: Double {
        (zip(verified, plain).map { $0.processor / $1.processor }.median ?? .nan) - 1
    }

    var cells: [BenchmarkCell] {
        guard !plain.isEmpty else { return [] }
        return [("verified", verified), ("plain", plain)].map { name, samples in
            BenchmarkCell(
                [("stream", "rounds"), ("by", name)],
                [
                    (name: "gb-per-s", samples: samples.map(\.gigabytesPerSecond)),
                    (name: "cpu-s-per-gb", samples: samples.map(\.processor)),
                    (name: "send-cpu-s-per-gb", samples: samples.map(\.sendSecondsPerGigabyte)),
                    (name: "receive-cpu-s-per-gb", samples: samples.map(\.receiveSecondsPerGigabyte)),
                ])
        }
    }
}
