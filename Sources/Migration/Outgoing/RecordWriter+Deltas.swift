import GuestMemory
import Host
import MigrationStream

// From the second round on, with `xbzrle`.

extension RecordWriter {
    /// Pages that changed little go as deltas, one record each; the others as ever, save that those the cache keeps are sent from it.
    mutating func writeDeltas(
        _ block: Int, _ ranges: [Range<PageIndex>], batches: Bool, _ findsZeroes: Bool, _ sent: inout Sent
    ) {
        let mapping = memory.blocks[block].mapping
        var runs: [PageRun] = []
        var contents: [(mapping: Mapping, offset: Int)] = []
        var head: [UInt8] = []
        for page in ranges.joined() {
            let offset = page.offset.value
            var kind = PageRunKind.data
            if findsZeroes, mapping.isZero(at: Int(offset), count: 4096) {
                deltas?.sentZero(block: block, page: page)
                kind = .zero
                sent.zero += 1
            } else {
                switch deltas?.form(block: block, page: page, in: mapping, keeps: keepsPages) ?? .direct {
                case .unchanged: continue
                case .delta(let byteCount):
                    head.removeAll(keepingCapacity: true)
                    let digest = deltaDigest(block, page)
                    encoder.pageDelta(block: block, offset: offset, byteCount: byteCount, digest: digest, into: &head)
                    append(head)
                    appendDelta(byteCount)
                    continue
                case .copy(let place): if let pages = deltas?.pages { contents.append((pages, place)) }
                case .direct: contents.append((mapping, Int(offset)))
                }
                sent.normal += 1
            }
            if let last = runs.last, last.kind == kind, last.offset + last.length == offset, batches {
                runs[runs.count - 1] = PageRun(kind: kind, offset: last.offset, pages: last.pages + 1)
            } else {
                runs.append(PageRun(kind: kind, offset: offset, pages: 1))
            }
        }
        append(block, runs, contents[...], batches: batches)
        sent.deltas = deltas?.takeCounts() ?? XBZRLECounts()
    }

    /// The digest of the page that a delta makes.
    private mutating func deltaDigest(_ block: Int, _ page: PageIndex) -> UInt64? {
        guard let verification, let working = deltas?.working else { return nil }
        let digest = verification.digest(working, at: 0, block: block, page: page.value)
        verification.sent(CollectionOfOne(page..<page.advanced(by: 1)), of: block, digests: [digest])
        return digest
    }

    private mutating func appendDelta(_ byteCount: Int) {
        guard let encoding = deltas?.encoding else { return }
        heads.copy(from: encoding, at: 0, count: byteCount, to: headBytes)
        vector.append(heads, offset: headBytes, count: byteCount)
        headBytes += byteCount
    }

    /// Records for runs whose contents stand, page by page, at `contents`.
    private mutating func append(
        _ block: Int, _ runs: [PageRun], _ contents: ArraySlice<(mapping: Mapping, offset: Int)>, batches: Bool
    ) {
        var contents = contents
        let most = batches ? StreamLimit.batchRuns : 1
        for start in stride(from: 0, to: runs.count, by: most) {
            let part = runs[start..<min(start + most, runs.count)]
            var head: [UInt8] = []
            if batches {
                encoder.batch(block: block, runs: part, into: &head)
            } else if runs[start].kind == .zero {
                encoder.zeroPage(block: block, offset: runs[start].offset, into: &head)
            } else {
                encoder.page(block: block, offset: runs[start].offset, into: &head)
            }
            append(head)
            if batches, let verification {
                let pages = part.lazy.filter { $0.kind == .data }.flatMap {
                    $0.offset / 4096..<$0.offset / 4096 + UInt64($0.pages)
                }
                var digests = zip(pages, contents).map { page, place in
                    verification.digest(place.mapping, at: place.offset, block: block, page: page)
                }[...]
                appendDigests(of: part, of: block, from: &digests)
            }
            for run in part where run.kind == .data {
                for content in contents.prefix(Int(run.pages)) {
                    vector.append(content.mapping, offset: content.offset, count: 4096)
                }
                contents = contents.dropFirst(Int(run.pages))
            }
        }
    }
}
