import GuestMemory

// Goes when the record types themselves do this.

extension DirtyPages {
    func formUnion(_ other: any DirtyPages) {
        var position = PageIndex(0)
        while let run = other.nextRun(from: position, limit: 1 << 20) {
            set(run)
            position = run.upperBound
        }
    }

    func removeAll() {
        var position = PageIndex(0)
        while let run = nextRun(from: position, limit: 1 << 20) {
            clear(run)
            position = run.upperBound
        }
    }

    func takeAll(into other: any DirtyPages) {
        guard !isEmpty else { return }
        other.formUnion(self)
        removeAll()
    }

    @unsafe func insert(_ pages: UnsafeBufferPointer<UInt64>) {
        for index in pages.indices {
            let page = unsafe PageIndex(pages[index])
            if page.value < pageCount { set(page..<page.advanced(by: 1)) }
        }
    }

    @unsafe func merge(
        _ words: UnsafeBufferPointer<UInt64>, fromBit firstBit: UInt64, pageCount: UInt64, at first: PageIndex
    ) {
        if firstBit % 64 == 0, first.value % 64 == 0,
            pageCount % 64 == 0 || firstBit + pageCount >= UInt64(words.count) * 64 - 63
        {
            let start = Int(firstBit / 64)
            return unsafe merge(
                UnsafeBufferPointer(rebasing: words[start..<start + Int((pageCount + 63) / 64)]), at: first)
        }
        for bit in firstBit..<firstBit + pageCount where unsafe words[Int(bit / 64)] >> (bit % 64) & 1 != 0 {
            let page = first.advanced(by: Int(bit - firstBit))
            set(page..<page.advanced(by: 1))
        }
    }
}
