/// A run of pages of which the same is known: whether they are filled, and by which vCPU's walk they are touched.
struct GuestExpectation {
    /// How far one vCPU's walk over its share of the working set has come.
    struct Walk {
        let order: PageOrder
        /// First position of the share, and how many there are.
        let firstPosition: UInt64
        let positions: UInt64
        let workFirst: UInt64
        let stride: UInt64
        /// Passes done, as the pages count them.
        let passes: UInt64
        /// Index of the page that is next, or in flight.
        let index: UInt64
        /// Whether the page at `index` may have been written: not before the walk has begun.
        let hasBegun: Bool
    }

    let pages: Range<UInt64>
    /// Whether every page has been filled; otherwise only a page that a walk has touched has known content.
    let isFilled: Bool
    /// Whether the pages may be anything: not filled yet, or being filled.
    let isPending: Bool
    let walk: Walk?
    let words: Int
    let seed: UInt64

    /// Whether there is something to compare.
    var isKnown: Bool { isFilled || (!isPending && walk != nil) }

    /// Cut the guest's range where what is known changes, and at the hole below 4 GiB.
    static func runs(parameters: ParameterBlock, status: GuestStatus, map: MemoryMap) -> [GuestExpectation] {
        let active = UInt64(status.cpusActive)
        guard active > 0 else {
            return [
                GuestExpectation(
                    pages: parameters.fillFirst..<parameters.mappedPages, isFilled: false, isPending: true, walk: nil,
                    words: Int(parameters.words), seed: parameters.seed)
            ]
        }
        let range = parameters.fillFirst..<parameters.mappedPages
        var filled: [Range<UInt64>] = []
        var walks: [(pages: Range<UInt64>, walk: Walk)] = []
        for cpu in 0..<active {
            let share = Self.share(of: parameters.fillPages, cpu: cpu, active: active)
            let done = min(status.cpus[Int(cpu)].filledPages, UInt64(share.count))
            let first = parameters.fillFirst + share.lowerBound
            filled.append(first..<first + done)
            if let walk = walk(of: cpu, active: active, parameters: parameters, state: status.cpus[Int(cpu)]) {
                let start = parameters.workFirst + walk.firstPosition * parameters.stride
                let end = start + walk.positions * parameters.stride
                walks.append((start..<min(end, parameters.mappedPages), walk))
            }
        }
        var cuts =
            filled.flatMap { [$0.lowerBound, $0.upperBound] } + [range.lowerBound, range.upperBound, map.lowPages]
        cuts += walks.flatMap { [$0.pages.lowerBound, $0.pages.upperBound] } + [parameters.fillRange.upperBound]
        let edges = Set(cuts.filter { $0 >= range.lowerBound && $0 <= range.upperBound }).sorted()
        return zip(edges, edges.dropFirst()).map { first, end in
            let isFilled = filled.contains { $0.contains(first) }
            return GuestExpectation(
                pages: first..<end, isFilled: isFilled,
                isPending: !isFilled && parameters.fillRange.contains(first),
                walk: walks.first { $0.pages.contains(first) }?.walk,
                words: Int(parameters.words), seed: parameters.seed)
        }
    }

    /// How the guest divides things among its vCPUs.
    static func share(of count: UInt64, cpu: UInt64, active: UInt64) -> Range<UInt64> {
        count * cpu / active..<count * (cpu + 1) / active
    }

    private static func walk(
        of cpu: UInt64, active: UInt64, parameters: ParameterBlock, state: GuestStatus.CPU
    ) -> Walk? {
        let share = share(of: parameters.positions, cpu: cpu, active: active)
        guard parameters.writesPages, !share.isEmpty else { return nil }
        let bits = PageOrder.bits(positions: UInt64(share.count))
        let passes = state.progress >> bits
        let order = PageOrder(
            positions: UInt64(share.count), isRandom: parameters.isRandom, pass: passes, cpu: cpu, seed: parameters.seed
        )
        return Walk(
            order: order, firstPosition: share.lowerBound, positions: UInt64(share.count),
            workFirst: parameters.workFirst, stride: parameters.stride, passes: passes,
            index: state.progress & order.mask, hasBegun: state.phase == .running)
    }
}
