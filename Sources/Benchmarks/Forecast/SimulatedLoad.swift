import Glibc

/// A made-up guest: how many pages it writes at which moment, and which.
///
/// Four kinds, each from a seed. Rates lie around what the link carries, working sets around what the downtime allows, so that some loads
/// converge and some do not.
struct SimulatedLoad {
    enum Kind: String, CaseIterable, Sendable {
        /// One working set, written at random.
        case uniform
        /// Hot, warm and cold pages.
        case skewed
        /// Two or three phases, each with a rate and a part of memory of its own.
        case phases = "phase-changing"
        /// The rate rises and falls back, again and again.
        case sawtooth
    }

    /// A part of memory, and how much of the writing goes there.
    struct Region {
        var first: Int
        var count: Int
        var share: Double
    }

    struct Phase {
        var seconds: Double
        /// Writes per second at the beginning and at the end.
        var rate: (from: Double, to: Double)
        var regions: [Region]
    }

    let kind: Kind
    let seed: UInt64
    var random: SeededGenerator
    let pages: Int
    /// Pages at the end of memory that hold nothing but zeroes.
    let zeroPages: Int
    let linkPagesPerSecond: Double
    let downtimeLimitMilliseconds: UInt64
    let phases: [Phase]
    private let period: Double
    private var due = 0.0

    /// - Parameter place: 0 to 1, from light to heavy.
    init(_ kind: Kind, seed: UInt64, place: Double) {
        var random = SeededGenerator(state: seed)
        self.kind = kind
        self.seed = seed
        let pages = Int.random(in: 48...160, using: &random) << 10
        zeroPages = Bool.random(using: &random) ? 0 : Int(Double(pages) * .random(in: 0.1...0.4, using: &random))
        linkPagesPerSecond = .random(in: 15_000...50_000, using: &random)
        downtimeLimitMilliseconds = [20, 50, 100, 300].randomElement(using: &random) ?? 100
        self.pages = pages
        // From a third of what the link carries to twice of it.
        let rate = linkPagesPerSecond * Self.between(0.35, 2, place)
        phases = Self.phases(kind, rate: rate, pages: pages - zeroPages, using: &random)
        period = phases.reduce(0) { $0 + $1.seconds }
        self.random = random
    }

    /// Between two positive numbers, evenly by their logarithms.
    private static func between(_ low: Double, _ high: Double, _ place: Double) -> Double {
        low * pow(high / low, place)
    }

    private static func phases(
        _ kind: Kind, rate: Double, pages: Int, using random: inout SeededGenerator
    ) -> [Phase] {
        func part(_ low: Double, _ high: Double, share: Double = 1) -> Region {
            let count = max(64, Int(Double(pages) * between(low, high, .random(in: 0...1, using: &random))))
            return Region(first: .random(in: 0...pages - min(count, pages), using: &random), count: count, share: share)
        }
        func steady(_ seconds: Double, _ rate: Double, _ regions: [Region]) -> Phase {
            Phase(seconds: seconds, rate: (rate, rate), regions: regions)
        }
        switch kind {
        case .uniform: return [steady(1, rate, [part(0.02, 1)])]
        case .skewed:
            let hot = Double.random(in: 0.5...0.9, using: &random)
            let warm = (1 - hot) * .random(in: 0.3...0.7, using: &random)
            return [
                steady(
                    1, rate,
                    [
                        part(0.002, 0.05, share: hot), part(0.05, 0.3, share: warm),
                        part(0.5, 1, share: 1 - hot - warm),
                    ])
            ]
        case .phases:
            return (0..<Int.random(in: 2...3, using: &random)).map { _ in
                steady(
                    .random(in: 0.15...0.7, using: &random), rate * .random(in: 0.2...1.8, using: &random),
                    [part(0.05, 0.6)])
            }
        case .sawtooth:
            let low = Double.random(in: 0...0.5, using: &random)
            return [
                Phase(
                    seconds: .random(in: 0.2...1, using: &random), rate: (rate * low, rate * (2 - low)),
                    regions: [part(0.05, 1)])
            ]
        }
    }

    /// Writes for a short while. - Parameter write: is given each page.
    mutating func run(from moment: Double, seconds: Double, _ write: (Int) -> Void) {
        let phase = phase(at: moment + seconds / 2)
        due += phase.rate * seconds
        while due >= 1 {
            due -= 1
            var place = Double.random(in: 0..<1, using: &random)
            var region = phase.regions[0]
            for candidate in phase.regions {
                region = candidate
                if place < candidate.share { break }
                place -= candidate.share
            }
            write(region.first + Int.random(in: 0..<region.count, using: &random))
        }
    }

    private func phase(at moment: Double) -> (rate: Double, regions: [Region]) {
        var rest = moment - (moment / period).rounded(.down) * period
        for phase in phases {
            if rest < phase.seconds {
                return (phase.rate.from + (phase.rate.to - phase.rate.from) * rest / phase.seconds, phase.regions)
            }
            rest -= phase.seconds
        }
        return (phases[0].rate.from, phases[0].regions)
    }
}

/// A seeded generator, so that a load can be played again (SplitMix64).
struct SeededGenerator: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94d0_49bb_1331_11eb
        return mixed ^ (mixed >> 31)
    }
}
