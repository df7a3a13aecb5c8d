/// Checks the memory of a stopped guest, page by page, against what the guest must have written.
///
/// It needs nothing but guest memory: the parameter block says what the guest does, each vCPU's status block how far it has come.
/// It is sound at any instant between two instructions. The one page each vCPU may just be writing is allowed both contents;
/// every other page has exactly one.
public struct GuestChecker {
    private let memory: GuestMemoryView

    /// Bytes read at a time: fits the second-level cache.
    static let chunkBytes = 256 << 10

    /// A checker of the memory `read` gives access to.
    public init(read: @escaping GuestMemoryReader) {
        memory = unsafe GuestMemoryView(read: read)
    }

    /// Compare every page of which something is known. The vCPUs must not run meanwhile.
    ///
    /// - Throws: ``GuestProgramError/notAGuest(reason:)`` if the memory is not that of a built-in guest, and what the reader throws.
    ///   Pages that are wrong are no error: see ``GuestCheck/isVerified``.
    public func check() throws(GuestProgramError) -> GuestCheck {
        let parameters = try memory.parameters()
        let map = try MemoryMap(
            memoryBytes: parameters.memoryBytes, lowMemoryBytes: parameters.lowMemoryBytes, guest: "in memory")
        let status = try memory.status(of: parameters)
        var result = GuestCheck(status: status)
        try checkOwnPages(parameters, map, &result)

        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes, alignment: 4096)
        // SAFETY: the buffer is used nowhere after this function.
        defer { unsafe buffer.deallocate() }
        for run in GuestExpectation.runs(parameters: parameters, status: status, map: map) {
            guard run.isKnown else {
                result.pagesUnwritten += UInt64(run.pages.count)
                continue
            }
            var first = run.pages.lowerBound
            while first < run.pages.upperBound {
                let count = min(run.pages.upperBound - first, UInt64(Self.chunkBytes) / GuestLayout.pageBytes)
                // SAFETY: `count` pages fit the buffer, which is aligned to a page and initialised by the reader.
                unsafe try memory.read(
                    map.physicalAddress(first * GuestLayout.pageBytes),
                    UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(count * GuestLayout.pageBytes)]))
                let words = unsafe UnsafeRawBufferPointer(buffer).bindMemory(to: UInt64.self)
                unsafe run.compare(words, firstPage: first, pages: Int(count), map: map, into: &result)
                first += count
            }
        }
        return result
    }

    /// Compare the guest's code and page tables, which nothing writes once they are loaded.
    private func checkOwnPages(
        _ parameters: ParameterBlock, _ map: MemoryMap, _ result: inout GuestCheck
    ) throws(GuestProgramError) {
        let offset = Int(GuestLayout.code - GuestLayout.entry)
        let code = GuestCode.bytes[offset..<offset + Int(GuestLayout.pageBytes)]
        try compare(Array(code), at: GuestLayout.code, &result)
        let tables = PageTables(map: map, mappedPages: parameters.mappedPages).bytes
        try compare(tables, at: GuestLayout.tables, &result)
    }

    private func compare(
        _ expected: [UInt8], at address: UInt64, _ result: inout GuestCheck
    ) throws(GuestProgramError) {
        for start in stride(from: 0, to: expected.count, by: Int(GuestLayout.pageBytes)) {
            let pageAddress = address + UInt64(start)
            let found = try memory.words(at: pageAddress, count: GuestLayout.wordsPerPage)
            result.pagesChecked += 1
            let wrong = found.indices.first { found[$0] != expected.word(at: start + $0 * 8) }
            if let wrong {
                result.record(
                    GuestCheck.Example(
                        fault: .damagedContent, physicalAddress: pageAddress, found: found[wrong],
                        expected: expected.word(at: start + wrong * 8)))
            }
        }
    }
}

extension [UInt8] {
    /// Read a little-endian word.
    func word(at offset: Int) -> UInt64 {
        (0..<8).reversed().reduce(0) { $0 << 8 | UInt64(self[offset + $1]) }
    }
}
