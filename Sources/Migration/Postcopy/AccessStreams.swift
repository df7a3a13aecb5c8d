/// In what order a guest asks for its pages, as far as that can be told from the requests: what comes next is taken in front of all else
/// that nobody asked for.
///
/// Each of a guest's threads may walk its own way, and nothing says which of them asked; so requests are sorted into *streams* by where they
/// are. A stream steps by the same number of pages each time, and its guess is refuted by a request that it did not expect. What came before
/// it was asked for is never asked for: so a step fits also if it leads over pages that have gone, and only over such pages; and
/// a stream whose step is too long hears of a page between two of its own, and goes on with what divides both.
struct AccessStreams: Sendable {
    private struct Stream {
        let block: Int
        /// The page that was asked for last.
        var last: Int64
        /// 0: asked for once, and nothing is known.
        var step: Int64 = 0
        /// So many pages are to be ahead of the guest.
        var window: Int
        /// The last page that was looked at for this stream.
        var head: Int64
        /// So many more are to be taken.
        var pending: Int

        /// Between two pages that are taken; a page that was asked for once is followed by its neighbours.
        var stepOfHead: Int64 { step == 0 ? 1 : step }

        init(_ page: Int64, of block: Int, step: Int64 = 0, window: Int) {
            (self.block, last, self.step, self.window) = (block, page, step, window)
            (head, pending) = (page, window)
        }
    }

    /// The one that was asked for last is at the end.
    private var streams: [Stream] = []
    /// The last requests, the newest at the end.
    private var history: [(block: Int, page: Int64)] = []

    private static let mostStreams = 32
    /// So many places stay for those of which nothing is known yet: neither drives the other out.
    private static let leastFresh = 8
    private static let historyLength = 32
    /// Two requests so close are taken for a stream.
    private static let nearby: Int64 = 16
    /// Three requests in equal steps are, up to this step.
    private static let farthest: Int64 = 1 << 14
    /// A stream's next request may be so many steps behind the last one, if all between have gone.
    private static let mostSteps: Int64 = 1024
    /// Requests that travel over several channels may overtake each other.
    private static let overtaken: Int64 = 8
    /// So many neighbours follow a page that belongs to no stream.
    private static let neighbours = 3
    private static let firstWindow = 2
    /// Up to here a stream is an opinion that the next request may change; from there on one that does not fit only narrows it.
    private static let trialWindow = 4
    /// So many pages are looked at for one batch.
    private static let mostLooks = 1024

    // MARK: Requests

    /// A page was asked for.
    /// - Parameters:
    ///   - most: how many pages may go ahead of a stream.
    ///   - isLeft: whether a page of this block was neither sent nor asked for yet.
    mutating func asked(_ page: UInt64, of block: Int, most: Int, isLeft: (Int64) -> Bool) {
        guard let place = Int64(exactly: page), place < Int64.max >> 2, isNews(place, block) else { return }
        defer { remember(place, block) }
        if goesOn(at: place, block, most, isLeft) { return }
        if let step = progression(to: place, block) {
            streams.removeAll { $0.block == block && $0.last == place - step && $0.window <= Self.trialWindow }
            insert(Stream(place, of: block, step: step, window: min(Self.trialWindow, most)))
        } else if !turns(to: place, block, most, isLeft) {
            insert(Stream(place, of: block, window: min(Self.neighbours, most)))
        }
    }

    /// A page that is asked for again, or behind those that were asked for after it, tells nothing.
    private func isNews(_ place: Int64, _ block: Int) -> Bool {
        !streams.contains { stream in
            guard stream.block == block else { return false }
            guard stream.step != 0, stream.window > Self.firstWindow else { return stream.last == place }
            let (steps, rest) = (stream.last - place).quotientAndRemainder(dividingBy: stream.step)
            return rest == 0 && (0...Self.overtaken).contains(steps)
        }
    }

    /// - Returns: whether a stream expected it.
    private mutating func goesOn(at place: Int64, _ block: Int, _ most: Int, _ isLeft: (Int64) -> Bool) -> Bool {
        let index = streams.indices.last { index in
            let stream = streams[index]
            return stream.block == block && stream.step != 0
                && leads(from: stream.last, to: place, by: stream.step, isLeft)
        }
        guard let index else { return false }
        var stream = streams.remove(at: index)
        stream.last = place
        stream.window = min(stream.window * 2, most)
        var ahead = (stream.head - place) / stream.step
        if ahead <= 0 { (stream.head, ahead) = (place, 0) }
        stream.pending = max(0, stream.window - Int(ahead))
        streams.append(stream)
        return true
    }

    /// Whether somebody who walks by these steps asks for `place` next: all on the way has gone.
    private func leads(from last: Int64, to place: Int64, by step: Int64, _ isLeft: (Int64) -> Bool) -> Bool {
        let (steps, rest) = (place - last).quotientAndRemainder(dividingBy: step)
        guard rest == 0, (1...Self.mostSteps).contains(steps) else { return false }
        return !(1..<steps).contains { isLeft(last + $0 * step) }
    }

    /// The shortest step by which two requests of late lead here.
    private func progression(to place: Int64, _ block: Int) -> Int64? {
        var shortest: Int64?
        for (index, middle) in history.enumerated().reversed() where middle.block == block {
            let step = place - middle.page
            guard step != 0, step.magnitude <= Self.farthest.magnitude,
                step.magnitude < shortest?.magnitude ?? .max
            else { continue }
            let isThere = history[..<index].contains { $0.block == block && $0.page == middle.page - step }
            if isThere { shortest = step }
        }
        return shortest
    }

    /// - Returns: whether there is a stream close by that goes on from here, by another step.
    private mutating func turns(to place: Int64, _ block: Int, _ most: Int, _ isLeft: (Int64) -> Bool) -> Bool {
        var nearest: Int?
        for index in streams.indices where streams[index].block == block {
            let distance = (place - streams[index].last).magnitude
            guard distance <= Self.nearby.magnitude else { continue }
            if let other = nearest, (place - streams[other].last).magnitude < distance { continue }
            nearest = index
        }
        guard let nearest else { return false }
        guard streams[nearest].window <= Self.trialWindow else {
            streams[nearest].window /= 2
            streams[nearest].pending = min(streams[nearest].pending, streams[nearest].window)
            return false
        }
        let stream = streams.remove(at: nearest)
        let distance = place - stream.last
        var step = distance
        if stream.step.signum() == distance.signum() {
            let divisor = Self.divisor(stream.step, distance) * distance.signum()
            if leads(from: stream.last, to: place, by: divisor, isLeft) { step = divisor }
        }
        streams.append(Stream(place, of: block, step: step, window: min(Self.firstWindow, most)))
        return true
    }

    /// The greatest that both have.
    private static func divisor(_ one: Int64, _ other: Int64) -> Int64 {
        var (one, other) = (one.magnitude, other.magnitude)
        while other != 0 { (one, other) = (other, one % other) }
        return Int64(one)
    }

    private mutating func insert(_ stream: Stream) {
        if streams.count == Self.mostStreams {
            let fresh = streams.indices.filter { streams[$0].step == 0 }
            streams.remove(at: fresh.count > Self.leastFresh ? fresh[0] : 0)
        }
        streams.append(stream)
    }

    private mutating func remember(_ place: Int64, _ block: Int) {
        if history.count == Self.historyLength { history.removeFirst() }
        history.append((block, place))
    }

    // MARK: What comes next

    /// Takes pages that will be asked for, of one block: those of the stream that was asked for last come first.
    /// - Parameters:
    ///   - bounds: of a block: how many pages it has, and how many of them may be taken at once.
    ///   - take: whether the caller got the page; one that went before, or is not needed, is passed over.
    mutating func takeNext(
        bounds: (_ block: Int) -> (pageCount: UInt64, atOnce: Int), take: (_ page: UInt64, _ block: Int) -> Bool
    ) {
        var (taken, looks) = (0, Self.mostLooks)
        var block: Int?
        for index in streams.indices.reversed() where streams[index].pending > 0 {
            guard block == nil || block == streams[index].block else { continue }
            let (count, most) = bounds(streams[index].block)
            while streams[index].pending > 0, taken < most, looks > 0 {
                let page = streams[index].head + streams[index].stepOfHead
                guard page >= 0, UInt64(page) < count else {
                    streams[index].pending = 0
                    break
                }
                streams[index].head = page
                looks -= 1
                guard take(UInt64(page), streams[index].block) else { continue }
                block = streams[index].block
                streams[index].pending -= 1
                taken += 1
            }
            if taken > 0, taken >= most { return }
            if looks == 0 {
                // Too little is left there to go on looking.
                streams[index].pending = 0
                return
            }
        }
    }
}
