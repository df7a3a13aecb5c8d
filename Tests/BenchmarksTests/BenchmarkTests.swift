import Benchmarks
import Testing

@Suite("benchmark results")
struct BenchmarkTests {
    @Test("a promise holds on the right side of its limit, and never without a value")
    func promises() {
        #expect(BenchmarkPromise("a", 1.0, limit: 1.05, better: .lower).holds)
        #expect(!BenchmarkPromise("a", 1.06, limit: 1.05, better: .lower).holds)
        #expect(BenchmarkPromise("a", 31, limit: 30, better: .higher).holds)
        #expect(!BenchmarkPromise("a", .nan, limit: 30, better: .higher).holds)
        #expect(BenchmarkPromise("a", 29, limit: nil, better: .higher).holds)
    }

    @Test("the median is the middle of what was measured")
    func median() {
        #expect([3.0, 1, 2].median == 2)
        #expect([4.0, 1, 2, 3].median == 2.5)
        #expect([Double]().median == nil)
    }
}
