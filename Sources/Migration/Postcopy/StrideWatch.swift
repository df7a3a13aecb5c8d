import GuestMemory

/// Notices that pages are asked for in equal steps, and tells which will be next. Several threads of a guest may each go their way.
struct StrideWatch: Sendable, Equatable {
    /// One thread's way through memory, as far as it can be guessed.
    private struct Walk: Equatable {
        var block: Int
        /// The last page that was asked for, or told to be next.
        var last: UInt64
        /// 0: not known yet.
        var step: Int64
        /// How often in a row it was that.
        var steps = 0
    }

    /// The one that was seen last is at the end.
    private var walks: [Walk] = []

    private static let mostWalks = 16
    /// Farther apart two pages belong to no walk, as far as anybody can tell.
    private static let farthest: Int64 = 1 << 14
    private static let wantedSteps = 2

    /// A page was asked for. - Returns: the pages that come next, at most `count`; none as long as no step was seen twice.
    mutating func asked(_ page: PageIndex, of block: Int, pageCount: UInt64, count: Int) -> [PageIndex] {
        guard var walk = take(page.value, block) else {
            if walks.count == Self.mostWalks { walks.removeFirst() }
            walks.append(Walk(block: block, last: page.value, step: 0))
            return []
        }
        let step = Int64(bitPattern: page.value &- walk.last)
        walk.steps = step == walk.step ? walk.steps + 1 : 1
        (walk.step, walk.last) = (step, page.value)
        var next: [PageIndex] = []
        if walk.steps >= Self.wantedSteps {
            for _ in 0..<count {
                let (value, isOutside) = Int64(walk.last).addingReportingOverflow(step)
                guard !isOutside, value >= 0, UInt64(value) < pageCount else { break }
                walk.last = UInt64(value)
                next.append(PageIndex(walk.last))
            }
        }
        walks.append(walk)
        return next
    }

    /// The walk that this page continues, best one that expects it; it is not in the list any more.
    private mutating func take(_ page: UInt64, _ block: Int) -> Walk? {
        func step(from walk: Walk) -> Int64 { Int64(bitPattern: page &- walk.last) }
        let near = walks.indices.filter { index in
            let step = step(from: walks[index])
            return walks[index].block == block && step != 0 && step.magnitude <= Self.farthest.magnitude
        }
        let expected = near.last { walks[$0].step == step(from: walks[$0]) }
        let nearest = near.min { step(from: walks[$0]).magnitude < step(from: walks[$1]).magnitude }
        return (expected ?? nearest).map { walks.remove(at: $0) }
    }
}
