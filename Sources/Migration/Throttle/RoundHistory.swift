import Glibc

/// What the rounds of a migration have shown so far: what each took, and how many pages the collect after it found.
///
/// For each intensity it keeps with what chance a page of it is dirty now, given the rounds there were. What was found is then a sum over
/// the classes of pages, which gives the classes.
public struct RoundHistory: Sendable {
    /// Pages that the first collect found: all that were ever touched.
    public private(set) var allocatedPages: Double?
    private var chances = [Double](repeating: 1, count: WriteModel.intensities.count)
    private var counts: [WriteModel.Count] = []
    private var remainingPages = 0.0
    private var pageBytes: Double?
    /// Rounds of the latest half second or more: bytes and seconds.
    private var recent: [(bytes: Double, seconds: Double)] = []
    /// Of the last round.
    public private(set) var uniqueBytesPerSecond = 0.0
    /// The fewest pages any collect found, and how many rounds ago.
    private var fewestPages = Double.infinity
    private var roundsSinceFewest = 0
    public let chunkCount: Int
    private static let mostCounts = 16
    private static let windowSeconds = 1.0

    public init(chunkCount: Int) { self.chunkCount = max(1, chunkCount) }

    /// Collects after rounds that were measured.
    public var collectCount: Int { counts.count }

    /// What the link carries, in bytes per second; `nil` as long as nothing was sent.
    public var linkBytesPerSecond: Double? {
        let bytes = recent.reduce(0) { $0 + $1.bytes }
        let seconds = recent.reduce(0) { $0 + $1.seconds }
        return bytes > 0 && seconds > 0 ? bytes / seconds : nil
    }

    /// On the wire, for a page of the latest rounds.
    public var bytesPerPage: Double { pageBytes ?? 4104 }

    /// The collect that began it all.
    public mutating func began(pages: UInt64) {
        allocatedPages = Double(pages)
        remainingPages = Double(pages)
    }

    /// A round was sent, and the collect after it found `remaining` pages in all.
    ///
    /// - Parameters:
    ///   - wholePages: of those sent, how many went with all their contents, compressed or not; `nil`: as the bytes tell.
    ///   - pace: the part of its time in which the guest could run.
    public mutating func collected(
        remaining: UInt64, sentPages: UInt64, wholePages: UInt64? = nil, sentBytes: UInt64, seconds: Double,
        pace: Double
    ) {
        guard allocatedPages != nil, seconds > 0 else { return }
        let sent = Double(sentPages)
        let share = remainingPages > 0 ? min(1, sent / remainingPages) : 1
        for (index, intensity) in WriteModel.intensities.enumerated() {
            let exposure = intensity * seconds * pace
            let written = 1 - exp(-exposure)
            let again = (1 - share) + share * sentChance(exposure)
            chances[index] = chances[index] * again + (1 - chances[index]) * written
        }
        for index in counts.indices { counts[index].weight *= 0.75 }
        counts.append(WriteModel.Count(chances: chances, pages: Double(remaining)))
        if counts.count > Self.mostCounts { counts.removeFirst() }
        let left = max(0, remainingPages - sent)
        uniqueBytesPerSecond = max(0, Double(remaining) - left) * 4096 / seconds
        // Rounds of zeroes tell nothing of the link, nor of what a written page takes.
        if sentBytes >= 256 << 10, wholePages.map({ Double($0) * 2 }) ?? Double(sentBytes) / 2048 >= sent {
            pageBytes = Double(sentBytes) / max(sent, 1)
            recent.append((bytes: Double(sentBytes), seconds: seconds))
            while recent.count > 1, recent.dropFirst().reduce(0, { $0 + $1.seconds }) >= Self.windowSeconds {
                recent.removeFirst()
            }
        }
        remainingPages = Double(remaining)
        roundsSinceFewest += 1
        if remainingPages < fewestPages * 0.95 { (fewestPages, roundsSinceFewest) = (remainingPages, 0) }
    }

    /// Whether rounds may still get shorter by themselves, whatever a model of so few of them says: they did just now, and the guest dirtied
    /// no more in the last than the link could have carried.
    public var mayShrink: Bool {
        roundsSinceFewest < 2 && uniqueBytesPerSecond < (linkBytesPerSecond ?? 0) * 1.15
    }

    /// The chance of a page that is sent in a round to be written after that.
    private func sentChance(_ exposure: Double) -> Double {
        guard exposure > 1e-9 else { return 0 }
        let steps = min(chunkCount, 24)
        let shift = chunkCount > steps ? 0.5 : 0
        let sum = (0..<steps).reduce(0.0) { $0 + 1 - exp(-exposure * (1 - (Double($1) + shift) / Double(steps))) }
        return sum / Double(steps)
    }

    /// How the guest writes, and what of each class is dirty now.
    /// - Parameter worst: of all that explains the counts, what faster rounds would help least: where rounds are equally long, nobody
    ///   can say how often a page is written in each.
    public func model(worst: Bool = false) -> (model: WriteModel, dirtyPages: [Double])? {
        guard let allocatedPages, !counts.isEmpty else { return nil }
        let classes = WriteModel.classes(
            explaining: counts, of: allocatedPages, believing: worst ? .worst : .likely)
        var dirty = zip(classes, chances).map { $0.pages * $1 }
        let sum = dirty.reduce(0, +)
        if sum > 0 { dirty = dirty.map { $0 * remainingPages / sum } }
        // More than there is of a class cannot be dirty; what is left over is no great matter.
        dirty = zip(dirty, classes).map { min($0, $1.pages) }
        return (WriteModel(classes: classes), dirty)
    }
}
