// Postcopy's commands, and the two places besides the stream where its words stand: the package and the channels of requested pages.

extension StreamDecoder {
    /// A decoder of the payload that ``PostcopyCommand/packaged(byteCount:)`` announced just now: device sections and the commands LISTEN,
    /// PING and RUN, without header. RUN is its last item; then ``checkEnd(_:)`` says whether it was all.
    public func packageDecoder() -> StreamDecoder {
        var decoder = self
        decoder.payloadBytes = 0
        decoder.isPackage = true
        return decoder
    }

    /// A decoder of a channel for requested pages: page records from the first byte on, without header, section or footer. The last item,
    /// if the source says a last word, is ``StreamItem/ramRecordsEnded``.
    /// - Parameter batches: the source is a Godwit that may send ``RAMFlags/batch``.
    public static func requestedPages(of blocks: [RAMBlockDescription], batches: Bool = false) -> StreamDecoder {
        var decoder = StreamDecoder(.load(blocks: blocks, catalogue: SectionCatalogue()))
        decoder.state = .records
        decoder.hasRecordsOnly = true
        decoder.allowsPageBatches = batches
        return decoder
    }

    /// The connection is another: what came last may have been cut off anywhere, and comes again from its section's head on. Sections
    /// that were started stay so. Also after an error.
    public mutating func connectionReplaced() {
        failure = nil
        payloadBytes = 0
        currentBlock = -1
        if state != .ended { state = hasRecordsOnly ? .records : .betweenSections }
    }

    /// Whether a connection that begins so takes up a postcopy: RECV_BITMAP, without a header.
    public static func recoveryIsAnnounced(by bytes: [UInt8]) -> Bool {
        bytes.count >= 3 && bytes[0] == SectionType.command.rawValue
            && UInt16(bytes[1]) << 8 | UInt16(bytes[2]) == CommandType.receiveBitmap.rawValue
    }

    /// The size of a block's pages, which stands behind its length where postcopy was advised and it is not the stream's own: each side
    /// knows from its own memory whether it does. Who describes a stream sees it: a name's length is not zero, nor are a record's flags.
    /// - Returns: nil when bytes are missing.
    func pageSize(of name: String, at index: Int, _ buffer: ReceiveBuffer) throws(StreamError) -> UInt64? {
        let usual = UInt64(Wire.pageSize)
        guard let advisedPageSizes, !pagesAreUniform else { return usual }
        let own = describes ? advisedPageSizes : blocks.first { $0.name == name }?.pageSize ?? usual
        guard own != usual else { return usual }
        guard buffer.count >= index + 8 else { return nil }
        let got = buffer.be64(index)
        if describes {
            return got > usual && got.nonzeroBitCount == 1 && got & advisedPageSizes != 0 ? got : usual
        }
        guard got == own else {
            throw error(.postcopy(.blockPageSize(block: name, got: got, expected: own)))
        }
        return got
    }

    // MARK: Commands

    /// - Returns: nil when the length does not fit.
    func postcopyCommand(
        _ type: CommandType, _ length: Int, _ buffer: ReceiveBuffer
    ) throws(StreamError) -> PostcopyCommand? {
        switch type {
        case .postcopyAdvise: return try advise(length, buffer)
        case .postcopyListen: return length == 0 ? .listen : nil
        case .postcopyRun: return length == 0 ? .run : nil
        case .postcopyRAMDiscard: return try discard(length, buffer)
        case .packaged:
            guard length == 4 else { return nil }
            let byteCount = buffer.be32(5)
            guard (1...UInt32(StreamLimit.packageBytes)).contains(byteCount) else {
                throw error(.postcopy(.packageLength(byteCount)))
            }
            return .packaged(byteCount: byteCount)
        case .postcopyResume: return length == 0 ? .resume : nil
        case .receiveBitmap:
            guard length >= 2, length == 1 + Int(buffer[5]) else { return nil }
            return .receiveBitmap(block: try known(buffer, at: 6, count: length - 1).name)
        default: return nil
        }
    }

    private func advise(_ length: Int, _ buffer: ReceiveBuffer) throws(StreamError) -> PostcopyCommand? {
        if length == 0 { return .advise(nil) }
        guard length == 16 else { return nil }
        let advice = PostcopyAdvice(blockPageSizes: buffer.be64(5), targetPageSize: buffer.be64(13))
        // A describing decoder tells what stands there.
        guard
            describes
                || (advice.targetPageSize == UInt64(Wire.pageSize) && advice.blockPageSizes >= advice.targetPageSize
                    && advice.blockPageSizes & (advice.targetPageSize - 1) == 0)
        else { throw error(.postcopy(.advice(advice))) }
        return .advise(advice)
    }

    private func discard(_ length: Int, _ buffer: ReceiveBuffer) throws(StreamError) -> PostcopyCommand? {
        // Version, length of the name, name, terminator, and a range at least.
        guard length >= 20 else { return nil }
        guard buffer[5] == 0 else { throw error(.postcopy(.discardVersion(buffer[5]))) }
        let nameLength = Int(buffer[6])
        let rangeBytes = length - 3 - nameLength
        guard nameLength > 0, rangeBytes >= 16, rangeBytes % 16 == 0 else { return nil }
        let block = try known(buffer, at: 7, count: nameLength)
        let start = 7 + nameLength + 1
        guard buffer[start - 1] == 0 else {
            throw error(.postcopy(.discardTerminator(block: block.name, buffer[start - 1])))
        }
        var ranges: [RAMDiscard.ByteRange] = []
        ranges.reserveCapacity(rangeBytes / 16)
        for index in stride(from: start, to: start + rangeBytes, by: 16) {
            let range = RAMDiscard.ByteRange(offset: buffer.be64(index), length: buffer.be64(index + 8))
            if let fault = block.fault(of: range.offset, range.length) { throw error(.postcopy(fault)) }
            ranges.append(range)
        }
        return .discard(RAMDiscard(block: block.name, ranges: ranges))
    }

    /// The block of that name.
    private func known(_ buffer: ReceiveBuffer, at index: Int, count: Int) throws(StreamError) -> RAMBlockDescription {
        for block in blockNames.indices
        where blockNames[block].count == count && buffer.holds(blockNames[block], at: index) {
            return blocks[block]
        }
        throw error(.unknownBlock(name: try name(buffer, at: index, count: count, of: "a RAM block")))
    }
}
