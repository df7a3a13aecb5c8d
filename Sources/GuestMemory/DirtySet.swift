/// A record of dirty pages whose size and cost follow the number of dirty pages, however large the block is: what stands behind KVM's
/// dirty rings.
///
/// A sorted directory of regions of 32,768 pages, each there only while something in it is dirty, and each in the form that suits it
/// (`DirtyRegion`). A page costs at most 32 bytes, and an eighth of a byte where all are dirty.
///
/// Directory entries of emptied regions stay until they are half of it: a sender empties regions one after the other from the front.
public final class DirtySet: DirtyPages {
    public let pageCount: UInt64
    public private(set) var count: UInt64 = 0
    /// Region numbers, ascending, and their regions.
    private var keys: [UInt64] = []
    private var regions: [DirtyRegion] = []
    private var emptyRegions = 0
    /// Where the last look ended: the next is mostly there or one further.
    private var hint = 0

    private static let regionPages = UInt64(DirtyRegion.pageCount)

    /// A record of `pageCount` clean pages.
    public init(pageCount: UInt64) { self.pageCount = pageCount }

    deinit { for index in regions.indices { regions[index].removeAll() } }

    public var isEmpty: Bool { count == 0 }

    /// What the record occupies, in bytes.
    public var byteCount: Int {
        regions.reduce(keys.capacity * 8 + regions.capacity * MemoryLayout<DirtyRegion>.stride) { $0 + $1.byteCount }
    }

    // MARK: DirtyPages

    public func set(_ pages: Range<PageIndex>) {
        precondition(pages.upperBound.value <= pageCount, "pages of the block")
        guard !pages.isEmpty else { return }
        let first = pages.lowerBound.value >> DirtyRegion.shift
        let last = (pages.upperBound.value - 1) >> DirtyRegion.shift
        if first == last {
            let index = indexOfRegion(first)
            let offset = Int(pages.lowerBound.value % Self.regionPages)
            if pages.upperBound.value - pages.lowerBound.value == 1 {
                change(index) { $0.insert(offset) ? 1 : 0 }
            } else {
                let part = offset..<offset + Int(pages.upperBound.value - pages.lowerBound.value)
                change(index) { $0.set(part) }
            }
            return
        }
        makeRegions(Array(first...last))
        var index = lowerBound(first)
        for key in first...last {
            let part = Self.part(of: pages, in: key)
            change(index) { $0.set(part) }
            index += 1
        }
    }

    @unsafe public func insert(_ pages: UnsafeBufferPointer<UInt64>) {
        guard pages.count > 32 else {
            for index in pages.indices where unsafe pages[index] < pageCount {
                let page = unsafe pages[index]
                change(indexOfRegion(page >> DirtyRegion.shift)) {
                    $0.insert(Int(page % Self.regionPages)) ? 1 : 0
                }
            }
            return
        }
        unsafe PageSort.forEachBatch(of: pages, below: pageCount) { sorted in unsafe insert(ascending: sorted) }
    }

    public func clear(_ pages: Range<PageIndex>) {
        precondition(pages.upperBound.value <= pageCount, "pages of the block")
        forEachRegion(in: pages) { index, part in
            let gone = regions[index].clear(part)
            count -= UInt64(gone)
            if gone > 0 && regions[index].isEmpty { emptyRegions += 1 }
        }
        dropEmptyRegions()
    }

    public func removeAll() {
        for index in regions.indices { regions[index].removeAll() }
        keys = []
        regions = []
        (count, emptyRegions, hint) = (0, 0, 0)
    }

    public func contains(_ page: PageIndex) -> Bool {
        precondition(page.value < pageCount, "a page of the block")
        let key = page.value >> DirtyRegion.shift
        let index = lowerBound(key)
        return index < keys.count && keys[index] == key
            && regions[index].contains(Int(page.value % Self.regionPages))
    }

    @unsafe public func merge(
        _ words: UnsafeBufferPointer<UInt64>, fromBit firstBit: UInt64, pageCount reported: UInt64, at first: PageIndex
    ) {
        guard
            let bits = unsafe ReportedBits(words, fromBit: firstBit, pageCount: reported, at: first, in: pageCount)
        else { return }
        let range = unsafe bits.range
        let size = DirtyRegion.pageCount
        // The regions are made all at once: one at a time would move the directory's rest for each.
        var present: [UInt64] = []
        for key in range.lowerBound / size...(range.upperBound - 1) / size {
            let part = range.clamped(to: key * size..<(key + 1) * size)
            if unsafe !bits.looksEmpty(part) { present.append(UInt64(key)) }
        }
        unsafe withUnsafeTemporaryAllocation(of: UInt64.self, capacity: DirtyRegion.wordCount) { scratch in
            let start = scratch.baseAddress!
            makeRegions(present)
            var index = present.isEmpty ? 0 : lowerBound(present[0])
            for key in present {
                while keys[index] < key { index += 1 }
                let firstWord = Int(key) * DirtyRegion.wordCount
                let words = unsafe bits.coveredWords.clamped(to: firstWord..<firstWord + DirtyRegion.wordCount)
                unsafe bits.copy(words: words, to: start)
                change(index) { unsafe $0.merge(start, at: words.lowerBound - firstWord, words.count) }
            }
        }
        dropEmptyRegions()
    }

    public func formUnion(_ other: any DirtyPages) {
        guard other !== self else { return }
        if let other = other as? DirtySet {
            makeRegions(other.keys)
            var index = other.keys.isEmpty ? 0 : lowerBound(other.keys[0])
            for (key, region) in zip(other.keys, other.regions) {
                while keys[index] < key { index += 1 }
                change(index) { $0.formUnion(region) }
            }
            dropEmptyRegions()
        } else if let other = other as? DirtyBitmap {
            unsafe other.forEachGroup(in: other.allPages) { first, words in unsafe merge(words, at: first) }
        } else {
            addRuns(of: other)
        }
    }

    public func take(_ pages: Range<PageIndex>, into other: any DirtyPages) {
        precondition(pages.upperBound.value <= min(pageCount, other.pageCount), "pages of both blocks")
        guard other !== self, !pages.isEmpty else { return }
        if let set = other as? DirtySet {
            var present: [UInt64] = []
            forEachRegion(in: pages) { index, _ in
                if !regions[index].isEmpty { present.append(keys[index]) }
            }
            set.makeRegions(present)
        }
        forEachRegion(in: pages) { index, part in move(part, of: index, into: other) }
        dropEmptyRegions()
        (other as? DirtySet)?.dropEmptyRegions()
    }

    @unsafe public func withWords<R>(of pages: Range<PageIndex>, _ body: (UnsafeBufferPointer<UInt64>) -> R) -> R {
        precondition(
            pages.lowerBound.value % 64 == 0 && pages.upperBound.value <= pageCount, "whole words of the block")
        let first = Int(pages.lowerBound.value / 64)
        let wordCount = Int((pages.upperBound.value + 63) / 64) - first
        let start = pages.lowerBound.value
        var scratch = [UInt64](repeating: 0, count: wordCount)
        let end = min(pageCount, (pages.upperBound.value + 63) / 64 * 64)
        return unsafe scratch.withUnsafeMutableBufferPointer { buffer in
            forEachRegion(in: pages.lowerBound..<PageIndex(max(start, end))) { index, part in
                let place = Int(keys[index]) * DirtyRegion.wordCount - first
                let indices = part.lowerBound / 64..<(part.upperBound + 63) / 64
                let target = unsafe buffer.baseAddress! + (place + indices.lowerBound)
                unsafe regions[index].withWords(indices, scratch: unsafe target) { words in
                    if unsafe words != UnsafePointer(target) { unsafe target.update(from: words, count: indices.count) }
                }
            }
            return unsafe body(UnsafeBufferPointer(buffer))
        }
    }

    public func nextRun(from page: PageIndex, limit: UInt64) -> Range<PageIndex>? {
        guard page.value < pageCount, limit > 0, count > 0 else { return nil }
        let wanted = page.value >> DirtyRegion.shift
        var index = lowerBound(wanted)
        while index < keys.count {
            let key = keys[index]
            let from = key == wanted ? Int(page.value % Self.regionPages) : 0
            if let offset = regions[index].next(from: from) {
                hint = index
                let start = key << DirtyRegion.shift + UInt64(offset)
                return PageIndex(start)..<PageIndex(runEnd(start, offset: offset, in: index, limit: limit))
            }
            index += 1
        }
        return nil
    }

    private func runEnd(_ start: UInt64, offset: Int, in index: Int, limit: UInt64) -> UInt64 {
        var (index, offset, end) = (index, offset, start)
        while true {
            let most = Int(min(limit - (end - start), Self.regionPages))
            let stop = regions[index].runEnd(from: offset, limit: offset + most)
            end += UInt64(stop - offset)
            guard stop == DirtyRegion.pageCount, end - start < limit, index + 1 < keys.count,
                keys[index + 1] == keys[index] + 1
            else { return end }
            (index, offset) = (index + 1, 0)
        }
    }

    // MARK: Directory

    private static func part(of pages: Range<PageIndex>, in key: UInt64) -> Range<Int> {
        let start = key << DirtyRegion.shift
        let low = max(pages.lowerBound.value, start) - start
        let high = min(pages.upperBound.value - start, regionPages)
        return Int(low)..<Int(high)
    }

    /// The first place whose key is at least `key`.
    private func lowerBound(_ key: UInt64) -> Int {
        unsafe keys.withUnsafeBufferPointer { keys in
            let near = hint
            if near < keys.count {
                if unsafe keys[near] == key { return near }
                if near + 1 < keys.count, unsafe keys[near + 1] == key { return near + 1 }
            }
            var low = 0
            var length = keys.count
            while length > 0 {
                let half = length &>> 1
                let isBelow = unsafe keys[low &+ half] < key
                low = isBelow ? low &+ half &+ 1 : low
                length = isBelow ? length &- half &- 1 : half
            }
            return low
        }
    }

    /// The place of a region, which is made if it is not there.
    private func indexOfRegion(_ key: UInt64) -> Int {
        let index = lowerBound(key)
        if index == keys.count || keys[index] != key {
            keys.insert(key, at: index)
            regions.insert(DirtyRegion(), at: index)
            emptyRegions += 1
        }
        hint = index
        return index
    }

    /// Makes those of the regions `wanted` (ascending) that are not there.
    private func makeRegions(_ wanted: [UInt64]) {
        guard let first = wanted.first else { return }
        var missing: [UInt64] = []
        var index = lowerBound(first)
        for key in wanted {
            while index < keys.count, keys[index] < key { index += 1 }
            if index == keys.count || keys[index] != key { missing.append(key) }
        }
        guard !missing.isEmpty else { return }
        emptyRegions += missing.count
        if keys.last.map({ $0 < missing[0] }) ?? true {
            keys += missing
            regions += Array(repeating: DirtyRegion(), count: missing.count)
            return
        }
        var (from, other, to) = (keys.count - 1, missing.count - 1, keys.count + missing.count - 1)
        keys += missing
        regions += Array(repeating: DirtyRegion(), count: missing.count)
        while other >= 0 {
            if from >= 0, keys[from] > missing[other] {
                (keys[to], regions[to]) = (keys[from], regions[from])
                from -= 1
            } else {
                (keys[to], regions[to]) = (missing[other], DirtyRegion())
                other -= 1
            }
            to -= 1
        }
    }

    /// Changes a region by what makes pages dirty, and keeps the counts.
    @inline(__always)
    private func change(_ index: Int, _ body: (inout DirtyRegion) -> Int) {
        let wasEmpty = regions[index].isEmpty
        count += UInt64(body(&regions[index]))
        if wasEmpty && !regions[index].isEmpty { emptyRegions -= 1 }
    }

    /// The regions that are there, with the part of `pages` in each.
    private func forEachRegion(in pages: Range<PageIndex>, _ body: (Int, Range<Int>) -> Void) {
        guard !pages.isEmpty, !keys.isEmpty else { return }
        var index = lowerBound(pages.lowerBound.value >> DirtyRegion.shift)
        hint = min(index, keys.count - 1)
        while index < keys.count, keys[index] << DirtyRegion.shift < pages.upperBound.value {
            body(index, Self.part(of: pages, in: keys[index]))
            index += 1
        }
    }

    private func dropEmptyRegions() {
        if count == 0 { return removeAll() }
        guard emptyRegions >= 32, emptyRegions * 2 > keys.count else { return }
        var to = 0
        for from in keys.indices where !regions[from].isEmpty {
            (keys[to], regions[to]) = (keys[from], regions[from])
            to += 1
        }
        keys.removeLast(keys.count - to)
        regions.removeLast(regions.count - to)
        (emptyRegions, hint) = (0, 0)
        if keys.capacity > 1024, keys.count < keys.capacity / 4 {
            keys = Array(keys)
            regions = Array(regions)
        }
    }

    // MARK: Many pages at once

    /// Marks pages that ascend, none twice, all in the block.
    private func insert(ascending pages: UnsafeBufferPointer<UInt64>) {
        var present: [UInt64] = []
        for index in pages.indices {
            let key = unsafe pages[index] >> DirtyRegion.shift
            if present.last != key { present.append(key) }
        }
        guard let first = present.first else { return }
        makeRegions(present)
        var place = lowerBound(first)
        unsafe withUnsafeTemporaryAllocation(of: UInt16.self, capacity: DirtyRegion.pageCount) { list in
            let offsets = list.baseAddress!
            var index = 0
            for key in present {
                var length = 0
                while index < pages.count, unsafe pages[index] >> DirtyRegion.shift == key {
                    unsafe offsets[length] = UInt16(truncatingIfNeeded: pages[index] % Self.regionPages)
                    (index, length) = (index &+ 1, length &+ 1)
                }
                while keys[place] < key { place += 1 }
                change(place) { unsafe $0.insert(ascending: offsets, length) }
            }
        }
        dropEmptyRegions()
    }

    /// Moves a part of a region; all of it as it stands where the other record is a set that has nothing there.
    private func move(_ part: Range<Int>, of index: Int, into other: any DirtyPages) {
        let region = regions[index]
        guard !region.isEmpty else { return }
        let start = keys[index] << DirtyRegion.shift
        if part.count == DirtyRegion.pageCount, let set = other as? DirtySet {
            let place = set.indexOfRegion(keys[index])
            if set.regions[place].isEmpty {
                set.regions[place] = region
                set.count += UInt64(region.count)
                set.emptyRegions -= 1
                regions[index] = DirtyRegion()
                count -= UInt64(region.count)
                emptyRegions += 1
                return
            }
        }
        let isSparse: Void? = unsafe region.withOffsets { offsets in
            for place in offsets.indices {
                let offset = unsafe Int(offsets[place])
                if part.contains(offset) { other.insert(PageIndex(start + UInt64(offset))) }
            }
        }
        if isSparse == nil {
            unsafe withUnsafeTemporaryAllocation(of: UInt64.self, capacity: DirtyRegion.wordCount) { scratch in
                unsafe region.withWords(0..<DirtyRegion.wordCount, scratch: scratch.baseAddress!) { words in
                    let bits = unsafe UnsafeBufferPointer(start: words, count: DirtyRegion.wordCount)
                    unsafe other.merge(
                        bits, fromBit: UInt64(part.lowerBound), pageCount: UInt64(part.count),
                        at: PageIndex(start + UInt64(part.lowerBound)))
                }
            }
        }
        count -= UInt64(regions[index].clear(part))
        if regions[index].isEmpty { emptyRegions += 1 }
    }
}
