import Benchmarks
import Testing

@Suite("bitmap benchmark")
struct BitmapBenchmarkTests {
    @Test("every cell is measured, in all runs, and its merges are right")
    func cells() throws {
        let result = try BitmapBenchmark().run(BenchmarkOptions(isQuick: true, runs: 2, only: "1 GiB"))
        #expect(result.bench == "bitmap" && result.runs == 2)
        let expected = ["50 %", "1 %", "0 %"].flatMap { [["1 GiB", $0, "aligned"], ["1 GiB", $0, "unaligned"]] }
        #expect(result.cells.map { $0.parameters.map(\.value) } == expected)
        for cell in result.cells {
            for quantity in cell.quantities {
                #expect(
                    quantity.samples.count == (quantity.name == "fresh-ms" ? 1 : 2)
                        && quantity.samples.allSatisfy { $0.isFinite && $0 >= 0 }, "\(quantity)"
                )
            }
        }
        #expect(
            result.promises.map(\.name) == [
                "merge-vs-bitwise", "unaligned-vs-bitwise", "merge-vs-bandwidth", "unaligned-vs-bandwidth",
            ])
        #expect(result.promises.allSatisfy { $0.value > 0 && $0.value.isFinite })
    }

    @Test("without cells no promise holds")
    func none() throws {
        let result = try BitmapBenchmark().run(BenchmarkOptions(only: "7 TiB"))
        #expect(result.cells.isEmpty && !result.holds)
    }
}
