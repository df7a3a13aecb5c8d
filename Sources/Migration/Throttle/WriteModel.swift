import Glibc

/// How a guest writes to its memory, as far as a migration cares: how many distinct pages it dirties in a stretch of time, U(t).
///
/// A rate cannot say that: a guest that writes 1 GB/s into 64 MiB dirties 64 MiB however long the round. So pages are counted in classes:
/// each page of a class is written at random, `perSecond` times a second, and is dirty after t with probability 1 - exp(-perSecond * t).
/// A sum of such classes comes near to any concave curve: one working set, hot and cold ones, or no bound within sight. How busy the guest
/// is at a time is a factor on all of them (`activity`).
public struct WriteModel: Sendable, Equatable {
    public struct PageClass: Sendable, Equatable {
        public var pages: Double
        /// Writes to each page, per second.
        public var perSecond: Double
        public init(pages: Double, perSecond: Double) {
            self.pages = pages
            self.perSecond = perSecond
        }
    }

    public var classes: [PageClass]
    public var activity: Activity

    public init(classes: [PageClass], activity: Activity = .steady) {
        self.classes = classes
        self.activity = activity
    }

    public var pages: Double { classes.reduce(0) { $0 + $1.pages } }

    /// Distinct pages written in `exposure`: seconds of mean activity.
    public func uniquePages(exposure: Double) -> Double {
        classes.reduce(0) { $0 + $1.pages * (1 - exp(-$1.perSecond * exposure)) }
    }

    /// How busy a guest is over time: steps with a factor each, over and over again. The mean is 1.
    public struct Activity: Sendable, Equatable {
        /// Where the steps end, in seconds, and the exposure summed up until there.
        private var ends: [Double]
        private var sums: [Double]

        public static let steady = Activity(steps: [])

        /// - Parameter steps: length in seconds, and exposure in it: length times factor.
        public init(steps: [(seconds: Double, exposure: Double)]) {
            ends = []
            sums = []
            let seconds = steps.reduce(0) { $0 + $1.seconds }
            let exposure = steps.reduce(0) { $0 + $1.exposure }
            guard seconds > 0, exposure > 0 else { return }
            var (end, sum) = (0.0, 0.0)
            for step in steps where step.seconds > 0 {
                end += step.seconds
                sum += step.exposure * seconds / exposure
                ends.append(end)
                sums.append(sum)
            }
        }

        /// The length of all steps, in seconds; 0 for one that is steady.
        public var period: Double { ends.last ?? 0 }

        /// The exposure from 0 to a moment.
        public func exposure(until moment: Double) -> Double {
            guard let period = ends.last, let whole = sums.last else { return moment }
            let turns = (moment / period).rounded(.down)
            let rest = moment - turns * period
            var (low, high) = (0, ends.count - 1)
            while low < high {
                let middle = (low + high) / 2
                if ends[middle] <= rest { low = middle + 1 } else { high = middle }
            }
            let start = low == 0 ? 0 : ends[low - 1]
            let before = low == 0 ? 0 : sums[low - 1]
            let share = min(1, max(0, (rest - start) / (ends[low] - start)))
            return turns * whole + before + (sums[low] - before) * share
        }
    }
}

extension WriteModel {
    /// The intensities that are looked for, in writes per second: none, then from one in minutes to thousands.
    static let intensities: [Double] = [0] + (0..<35).map { 0.005 * pow(1.5, Double($0)) }

    /// A number of pages that was counted, and with what probability a page of each intensity is among them.
    struct Count {
        var chances: [Double]
        var pages: Double
        var weight = 1.0
    }

    /// Which of several intensities is believed where the counts do not tell them apart.
    enum Belief {
        /// The lower is likelier: no guest writes everywhere a thousand times a second.
        case likely
        /// What is dirty whenever one looks is written as fast as can be, and all else not at all: faster rounds would not help.
        case worst
    }

    /// The classes that explain the counts best, of `total` pages: expectation and maximisation over the grid of intensities. What the
    /// counts do not tell stays as it was at the start.
    static func classes(
        explaining counts: [Count], of total: Double, believing belief: Belief = .likely, steps: Int = 1000
    ) -> [PageClass] {
        let size = intensities.count
        var found =
            switch belief {
            case .likely: intensities.map { 1 / max(1, $0).squareRoot() }
            case .worst: intensities.indices.map { $0 == 0 || $0 == size - 1 ? 1 : 1e-4 }
            }
        let start = found.reduce(0, +)
        found = found.map { $0 * total / start }
        // Errors count in proportion: a round of a millisecond tells as much as one of a second.
        var all = counts.filter { $0.pages >= 0 }.map { count -> Count in
            var count = count
            count.weight /= max(count.pages, 16)
            return count
        }
        let trust = all.reduce(0) { $0 + $1.weight * max($1.pages, 16) }
        all.append(
            Count(
                chances: [Double](repeating: 1, count: size), pages: total, weight: max(trust, 1) / max(total, 1)))
        let weights = (0..<size).map { index in all.reduce(0) { $0 + $1.weight * $1.chances[index] } }
        for _ in 0..<steps {
            var gains = [Double](repeating: 0, count: size)
            for count in all {
                var expected = 1e-9
                for index in 0..<size { expected += found[index] * count.chances[index] }
                let gain = count.weight * count.pages / expected
                for index in 0..<size { gains[index] += gain * count.chances[index] }
            }
            for index in 0..<size { found[index] *= gains[index] / max(weights[index], 1e-12) }
        }
        return zip(found, intensities).map { PageClass(pages: $0, perSecond: $1) }
    }
}
