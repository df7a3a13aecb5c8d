import Testing

@testable import Benchmarks

@Suite("The forecast benchmark")
struct ForecastTests {
    @Test("a simulated guest is the same each time its seed is played, and another with another")
    func seeds() {
        func pages(_ seed: UInt64) -> [Int] {
            var load = SimulatedLoad(.skewed, seed: seed, place: 0.5)
            var pages: [Int] = []
            for step in 0..<10 { load.run(from: Double(step) * 0.001, seconds: 0.001) { pages.append($0) } }
            return pages
        }
        #expect(!pages(1).isEmpty)
        #expect(pages(1) == pages(1))
        #expect(pages(1) != pages(2))
    }

    @Test("loads of every kind write where memory is, and from light to heavy", arguments: SimulatedLoad.Kind.allCases)
    func loads(kind: SimulatedLoad.Kind) {
        var rates: [Double] = []
        for place in [0.05, 0.95] {
            for seed in 1...5 as ClosedRange<UInt64> {
                var load = SimulatedLoad(kind, seed: seed, place: place)
                let pages = 0..<load.pages - load.zeroPages
                var writes = 0
                for step in 0..<2000 {
                    load.run(from: Double(step) * 0.001, seconds: 0.001) {
                        writes += 1
                        if !pages.contains($0) { Issue.record("page \($0) of \(pages)") }
                    }
                }
                rates.append(Double(writes) / 2 / load.linkPagesPerSecond)
            }
        }
        #expect(rates.prefix(5).reduce(0, +) < rates.suffix(5).reduce(0, +))
        #expect(rates.contains { $0 < 0.8 } && rates.contains { $0 > 1 }, "\(rates)")
    }

    @Test("an idle guest migrates in the time its pages take, an endless writer never", .timeLimit(.minutes(10)))
    func extremes() {
        let light = ForecastTrial(.uniform, seed: 3, place: 0)
        #expect(light.isRight && light.truth.converges)
        #expect((light.totalError ?? 1) < 0.25, "\(light)")
    }
}
