import Glibc

/// What was seen of a guest's writes: the pages that each of several collects found, kept as how many of them had last been found when.
///
/// From these numbers follow the distinct pages of any run of intervals, whatever order pages were written in: of the pages of interval e,
/// those whose last finding lies before s are new to the window from s. One byte a page is enough to count them.
public struct DirtyObservation: Sendable {
    /// Pages that were ever touched: what the first round sends.
    public let allocatedPages: Double
    /// The length of each interval, in seconds.
    public private(set) var seconds: [Double] = []
    /// By interval, then by the interval (plus one) in which the page was found before; 0 for never.
    private var found: [[Double]] = []
    /// Findings by chunk of the memory.
    private var foundByChunk: [Int: Double] = [:]

    public init(allocatedPages: Double) { self.allocatedPages = allocatedPages }

    /// More are not told apart by a byte.
    public static let mostIntervals = 250

    public var intervalCount: Int { seconds.count }
    public var totalSeconds: Double { seconds.reduce(0, +) }

    /// Begins to count an interval's pages. - Parameter seconds: its length.
    public mutating func beginInterval(seconds: Double) {
        self.seconds.append(seconds)
        found.append([Double](repeating: 0, count: found.count + 1))
    }

    /// Counts a page of the present interval. - Parameter mark: the page's byte, 0 at first.
    @inline(__always)
    public mutating func count(_ mark: inout UInt8) {
        let interval = found.count - 1
        found[interval][Int(min(mark, UInt8(interval)))] += 1
        mark = UInt8(truncatingIfNeeded: interval + 1)
    }

    /// Counts pages of the present interval by the chunk of memory they lie in: what is watched afresh together.
    public mutating func count(pages: Int, inChunk chunk: Int) { foundByChunk[chunk, default: 0] += Double(pages) }

    /// Over so many chunks written pages are spread, counted as if evenly: a working set in one corner of a large guest lies in few.
    public var chunkCount: Int {
        let sum = foundByChunk.values.reduce(0, +)
        let squares = foundByChunk.values.reduce(0) { $0 + $1 * $1 }
        return squares > 0 ? max(1, Int((sum * sum / squares).rounded())) : 1
    }

    /// Distinct pages written in a run of intervals.
    public func uniquePages(_ window: ClosedRange<Int>) -> Double {
        var sum = 0.0
        for interval in window {
            for before in 0...min(window.lowerBound, interval) { sum += found[interval][before] }
        }
        return sum
    }

    /// Bytes per second of distinct pages, over all that was seen.
    public var uniqueBytesPerSecond: Double {
        guard totalSeconds > 0 else { return 0 }
        return uniquePages(0...intervalCount - 1) * 4096 / totalSeconds
    }

    // MARK: The model

    /// What explains the observation: classes of pages, and how busy the guest was in each interval.
    public func model() -> WriteModel {
        guard intervalCount > 0, totalSeconds > 0 else {
            return WriteModel(classes: [.init(pages: allocatedPages, perSecond: 0)])
        }
        let windows = windows
        var exposures = seconds
        var classes: [WriteModel.PageClass] = []
        for _ in 0..<4 {
            classes = Self.classes(windows, exposures, of: allocatedPages)
            exposures = exposuresPerInterval(classes)
        }
        let steps = zip(seconds, exposures).map { (seconds: $0, exposure: $1) }
        return WriteModel(classes: classes, activity: Self.activity(steps))
    }

    /// What was seen, cut to whole turns where it repeats itself: played over and over it must not stumble.
    private static func activity(_ steps: [(seconds: Double, exposure: Double)]) -> WriteModel.Activity {
        let whole = WriteModel.Activity(steps: steps)
        let tick = 0.01
        let count = Int(whole.period / tick)
        guard count > 40 else { return whole }
        let rates = (0..<count).map {
            (whole.exposure(until: Double($0 + 1) * tick) - whole.exposure(until: Double($0) * tick)) / tick
        }
        let mean = rates.reduce(0, +) / Double(count)
        let variance = rates.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / Double(count)
        guard variance > 0.01 else { return whole }
        // How far the guest is from what it was so long before, as a part of how far it is from itself at any time.
        let differences = (10...count / 2).map { lag -> (lag: Int, value: Double) in
            let sum = (lag..<count).reduce(0.0) { sum, place in
                let difference = rates[place] - rates[place - lag]
                return sum + difference * difference
            }
            return (lag, sum / Double(count - lag) / (2 * variance))
        }
        guard let least = differences.map(\.value).min(), least < 0.5,
            let valley = differences.firstIndex(where: { $0.value < least + 0.08 })
        else { return whole }
        // From the first that is good enough down to the bottom of its valley.
        var bottom = valley
        while bottom + 1 < differences.count, differences[bottom + 1].value <= differences[bottom].value { bottom += 1 }
        let lag = differences[bottom].lag
        let kept = count / lag * lag
        return WriteModel.Activity(steps: rates.suffix(kept).map { (seconds: tick, exposure: $0 * tick) })
    }

    private struct Window {
        let intervals: ClosedRange<Int>
        let pages: Double
    }

    /// Runs of every length, wherever they begin; of long ones not all.
    private var windows: [Window] {
        var windows: [Window] = []
        var length = 1
        while length <= intervalCount {
            let step = max(1, length / 4)
            for first in stride(from: 0, through: intervalCount - length, by: step) {
                let intervals = first...first + length - 1
                windows.append(Window(intervals: intervals, pages: uniquePages(intervals)))
            }
            length += max(1, length / 3)
        }
        let whole = 0...intervalCount - 1
        windows.append(Window(intervals: whole, pages: uniquePages(whole)))
        return windows
    }

    /// Windows of about the same exposure are one count: their mean.
    private static func classes(
        _ windows: [Window], _ exposures: [Double], of total: Double
    ) -> [WriteModel.PageClass] {
        var sums = [0.0]
        for exposure in exposures { sums.append(sums[sums.count - 1] + exposure) }
        struct Bin {
            var pages = 0.0
            var number = 0.0
            var chances = [Double](repeating: 0, count: WriteModel.intensities.count)
        }
        var bins: [Int: Bin] = [:]
        for window in windows {
            let exposure = sums[window.intervals.upperBound + 1] - sums[window.intervals.lowerBound]
            guard exposure > 0 else { continue }
            let place = Int((log(exposure) * 4).rounded(.down))
            var bin = bins[place] ?? Bin()
            bin.pages += window.pages
            bin.number += 1
            for (index, intensity) in WriteModel.intensities.enumerated() {
                bin.chances[index] += 1 - exp(-intensity * exposure)
            }
            bins[place] = bin
        }
        let counts = bins.keys.sorted().compactMap { bins[$0] }.map { bin in
            WriteModel.Count(chances: bin.chances.map { $0 / bin.number }, pages: bin.pages / bin.number)
        }
        return WriteModel.classes(explaining: counts, of: total)
    }

    /// For each interval the exposure in which these classes dirty as many pages as were found.
    private func exposuresPerInterval(_ classes: [WriteModel.PageClass]) -> [Double] {
        let model = WriteModel(classes: classes)
        let exposures = seconds.indices.map { index -> Double in
            let pages = uniquePages(index...index)
            var (low, high) = (0.0, seconds[index] * 20)
            guard pages > 0 else { return 0 }
            for _ in 0..<40 {
                let middle = (low + high) / 2
                if model.uniquePages(exposure: middle) < pages { low = middle } else { high = middle }
            }
            return high
        }
        let sum = exposures.reduce(0, +)
        guard sum > 0 else { return seconds }
        return exposures.map { $0 * totalSeconds / sum }
    }
}
