import Glibc
public import Host

extension RAMBlock {
    static func hugetlb(
        _ name: String, _ byteCount: UInt64, _ backing: RAMBacking
    ) throws(SystemError) -> (MemoryFile, Mapping) {
        let size = backing.pageBytes
        let object = "\(byteCount) bytes in huge pages of \(size >> 20) MiB"
        guard byteCount % size == 0 else {
            throw SystemError("make", object, code: EINVAL, remedy: "RAM must be a multiple of a huge page")
        }
        do throws(SystemError) {
            let file = try MemoryFile(name: "godwit-\(name)", byteCount: byteCount, pageBytes: Int(size))
            // A huge page that is not there when it is touched would end the process.
            return (file, try Mapping(file.descriptor, byteCount: Int(byteCount), reserves: true))
        } catch {
            throw SystemError(
                "reserve", object, code: error.code,
                remedy: "have the host reserve them: /sys/kernel/mm/hugepages/hugepages-\(size >> 10)kB/nr_hugepages")
        }
    }

    /// Whether the kernel may back the block with huge pages, where it would else: it fills what is missing of one with zeroes.
    public func allowHugePages(_ allowed: Bool) {
        // Refused only by a host that has no huge pages at all.
        if !allowed { try? mapping.advise(.noHugePages) } else if wantsHugePages { try? mapping.advise(.hugePages) }
    }

    /// Pages in one transparent huge page of the processor's.
    public static let transparentHugePages: UInt64 = (2 << 20) >> GuestPage.shift

    /// The first page at which a transparent huge page can lie: their addresses are multiples of their size.
    public var firstHugePlace: PageIndex {
        let behind = UInt64(mapping.hostAddress(at: 0)) >> GuestPage.shift % Self.transparentHugePages
        return PageIndex(behind == 0 ? 0 : Self.transparentHugePages - behind)
    }

    /// Pages that one transparent huge page can hold, that one among them; `nil`: none has place there, or the block wants none.
    public func hugePlace(holding page: PageIndex) -> Range<PageIndex>? {
        let first = firstHugePlace
        guard wantsHugePages, page >= first else { return nil }
        let behind = (page.value - first.value) % Self.transparentHugePages
        guard page.value - behind + Self.transparentHugePages <= pageCount else { return nil }
        let start = PageIndex(page.value - behind)
        return start..<start.advanced(by: Int(Self.transparentHugePages))
    }

    /// Pages of a range that the page tables of this process show, but for the kernel's common zero page.
    public func touchedPages(in pages: Range<PageIndex>) throws(SystemError) -> UInt64 {
        let range = Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
        let bytes = try pageMap.allTouched(in: mapping, range).reduce(0) { $0 + $1.count }
        return UInt64(bytes) >> GuestPage.shift
    }

    /// Has the kernel copy pages that lie in one huge page's place into one, now (MADV_COLLAPSE, Linux 6.1).
    /// - Throws: `SystemError`: the kernel cannot, has none left, or may not fill up what is missing.
    public func collapse(_ pages: Range<PageIndex>) throws(SystemError) {
        let (start, end) = (Int(pages.lowerBound.offset.value), Int(pages.upperBound.offset.value))
        try mapping.advise(.collapse, at: start, count: end - start)
    }

    /// How many of its pages of 4 KiB are parts of huge ones; `nil` where the kernel does not tell (before Linux 6.7).
    public func hugePages() -> UInt64? {
        (try? pageMap.hugeBytes(in: mapping)).flatMap { $0 }.map { UInt64($0) >> GuestPage.shift }
    }
}
