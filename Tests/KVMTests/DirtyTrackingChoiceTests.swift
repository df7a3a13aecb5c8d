import Accelerator
import Testing

@Suite struct DirtyTrackingChoiceTests {
    private func refusal(_ choice: DirtyTrackingChoice, limit: Int) -> String {
        do {
            let entries = try choice.ringEntries(limit: limit)
            return entries.map { "\($0)" } ?? "log"
        } catch { return error.description }
    }

    @Test(
        "a ring has the size asked for, or the largest; the log is used unless a ring was asked for"
    )
    func sizes() {
        #expect(refusal(.log, limit: 65536) == "log")
        #expect(refusal(.ring(entryCount: nil), limit: 65536) == "65536")
        #expect(refusal(.ring(entryCount: 4096), limit: 65536) == "4096")
        #expect(refusal(.ring(entryCount: 256), limit: 65536) == "256")
        #expect(refusal(.automatic, limit: 0) == "log")
        #expect(refusal(.automatic, limit: 65536) == "log")
        #expect(refusal(.ring(entryCount: nil), limit: 0).contains("this kernel's KVM has no dirty ring"))
    }

    @Test(
        "a size that is no power of two, too small or too large is named with what is possible",
        arguments: [0, -4096, 128, 1000, 131072])
    func wrongSizes(entries: Int) {
        let text = refusal(.ring(entryCount: entries), limit: 65536)
        #expect(text.hasPrefix("dirty-ring-size=\(entries): "))
        #expect(text.contains("a power of two of entries, 256 to 65536"))
    }
}
