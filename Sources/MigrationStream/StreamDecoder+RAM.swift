// The body of the RAM section.

extension StreamDecoder {
    // MARK: The block list

    mutating func ramBlockList(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        if listTotal == 0 {
            guard buffer.count >= 8 else { return .needMore }
            let word = buffer.be64(0)
            guard word & RAMFlags.mask == RAMFlags.memorySize.rawValue, word > RAMFlags.mask else {
                throw error(.blockListMissing(word: word))
            }
            listTotal = word & ~RAMFlags.mask
            listRemaining = listTotal
            advance(8, in: &buffer)
        }
        while listRemaining > 0 {
            guard buffer.count >= 1, buffer.count >= 9 + Int(buffer[0]) else { return .needMore }
            let nameLength = Int(buffer[0])
            let name = try name(buffer, at: 1, count: nameLength, of: "a RAM block")
            let length = buffer.be64(1 + nameLength)
            try checkListed(name, length: length)
            guard let pageSize = try pageSize(of: name, at: 9 + nameLength, buffer) else { return .needMore }
            let block = RAMBlockDescription(name: name, length: length, pageSize: pageSize)
            let headEnd = 9 + nameLength + (pageSize == Wire.pageSize ? 0 : 8)
            var region: MappedRegion?
            if isMapped {
                region = try mappedRAMHeader(of: block, headEnd: headEnd, &buffer)
                guard region != nil else { return .needMore }
            }
            listed.append(block)
            listRemaining -= block.length
            advance(headEnd + (isMapped ? Int(MappedRAM.headerBytes) : 0), in: &buffer)
            if let region { return .item(.mappedBlock(region)) }
        }
        if describes {
            blocks = listed
            blockNames = listed.map { Array($0.name.utf8) }
            blockLengths = listed.map(\.length)
            currentBlock = -1
        } else {
            let missing = blocks.filter { block in !listed.contains { $0.name == block.name } }.map(\.name)
            guard missing.isEmpty else { throw error(.missingBlocks(missing)) }
        }
        state = .records
        return .item(.ramSetup(listed))
    }

    private func checkListed(_ name: String, length: UInt64) throws(StreamError) {
        guard length > 0, length % UInt64(Wire.pageSize) == 0, length <= StreamLimit.blockBytes else {
            throw error(.blockLengthInvalid(name: name, length))
        }
        if !describes {
            guard let own = blocks.first(where: { $0.name == name }) else { throw error(.unknownBlock(name: name)) }
            guard own.length == length else {
                throw error(.blockLength(name: name, got: length, expected: own.length))
            }
        }
        guard !listed.contains(where: { $0.name == name }) else { throw error(.repeatedBlock(name: name)) }
        guard length <= listRemaining else {
            let sum = listTotal - listRemaining + length
            throw error(.totalLength(announced: listTotal, listed: sum))
        }
        guard listed.count < StreamLimit.ramBlocks else {
            throw error(
                .tooMany(what: "RAM blocks", count: UInt64(listed.count) + 1, limit: StreamLimit.ramBlocks))
        }
    }

    // MARK: Records

    /// One RAM record: the hot path.
    mutating func record(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 8 else { return .needMore }
        let word = buffer.be64(0)
        let offset = word & ~RAMFlags.mask
        let sameBlock = word & RAMFlags.sameBlock.rawValue != 0
        let kind = word & RAMFlags.mask & ~RAMFlags.sameBlock.rawValue
        switch kind {
        case RAMFlags.page.rawValue:
            guard !carriesDigests else { throw error(.pageWithoutDigest(offset: offset)) }
            guard let body = try block(sameBlock, offset, &buffer) else { return .needMore }
            try checkPage(offset)
            advance(body, in: &buffer)
            payloadBytes = Wire.pageSize
            return .item(.page(block: currentBlock, offset: offset))
        case RAMFlags.zero.rawValue:
            guard let body = try block(sameBlock, offset, &buffer), buffer.count > body else { return .needMore }
            try checkPage(offset)
            guard buffer[body] == 0 else {
                throw error(.zeroPageFill(block: blocks[currentBlock].name, offset: offset, buffer[body]))
            }
            advance(body + 1, in: &buffer)
            return .item(.zeroPage(block: currentBlock, offset: offset))
        case RAMFlags.endOfSection.rawValue where offset == 0 && !sameBlock:
            advance(8, in: &buffer)
            state = hasRecordsOnly ? .ended : .ramFooter
            return tellsEndOfRecords || hasRecordsOnly ? .item(.ramRecordsEnded) : .again
        case RAMFlags.batch.rawValue:
            return try batch(sameBlock, offset, &buffer)
        case RAMFlags.xbzrle.rawValue:
            guard !hasRecordsOnly else { throw error(.postcopy(.recordOutOfPlace("the delta of a page"))) }
            return try delta(sameBlock, offset, &buffer)
        default:
            return try rareRecord(kind, word, &buffer)
        }
    }

    private mutating func rareRecord(
        _ kind: UInt64, _ word: UInt64, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Step {
        let offset = word & ~RAMFlags.mask
        switch kind {
        case RAMFlags.hook.rawValue: throw error(.unsupportedRecord("RDMA", offset: offset))
        case 0x01, 0x100: throw error(.unsupportedRecord("a page of an abandoned format", offset: offset))
        case RAMFlags.multifdFlush.rawValue where word == RAMFlags.multifdFlush.rawValue:
            guard !hasRecordsOnly else { throw error(.postcopy(.recordOutOfPlace("MULTIFD_FLUSH"))) }
            advance(8, in: &buffer)
            return .item(.multifdFlush)
        default: throw error(.unknownFlags(word & RAMFlags.mask, offset: offset))
        }
    }

    /// Makes the record's block the current one.
    ///
    /// - Returns: where the record goes on behind the first word and the name, or nil when bytes are missing.
    @inline(__always)
    private mutating func block(
        _ same: Bool, _ offset: UInt64, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Int? {
        if same {
            guard currentBlock >= 0 else { throw error(.noBlockNamed(offset: offset)) }
            return 8
        }
        return try namedBlock(&buffer)
    }

    private mutating func namedBlock(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Int? {
        guard buffer.count >= 9, buffer.count >= 9 + Int(buffer[8]) else { return nil }
        let length = Int(buffer[8])
        for index in blockNames.indices where blockNames[index].count == length {
            if buffer.holds(blockNames[index], at: 9) {
                currentBlock = index
                currentLength = blockLengths[index]
                return 9 + length
            }
        }
        throw error(.unknownBlock(name: try name(buffer, at: 9, count: length, of: "a page's RAM block")))
    }

    @inline(__always)
    private func checkPage(_ offset: UInt64) throws(StreamError) {
        guard offset < currentLength else {
            throw error(.pageOutside(block: blocks[currentBlock].name, offset: offset, length: currentLength))
        }
    }

    /// A page as its difference to what came before: a byte for the kind, the length, and the encoding as payload.
    private mutating func delta(
        _ sameBlock: Bool, _ offset: UInt64, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Step {
        guard let body = try block(sameBlock, offset, &buffer), buffer.count >= body + deltaHeadBytes else {
            return .needMore
        }
        try checkPage(offset)
        let name = blocks[currentBlock].name
        guard buffer[body] == XBZRLE.recordKind else {
            throw error(.deltaKind(block: name, offset: offset, buffer[body]))
        }
        let length = Int(buffer.be16(body + 1))
        guard (1...XBZRLE.longestEncoding).contains(length) else {
            throw error(.deltaLength(block: name, offset: offset, length))
        }
        if carriesDigests { digests = [buffer.be64(body + 3)] }
        advance(body + deltaHeadBytes, in: &buffer)
        payloadBytes = length
        return .item(.pageDelta(block: currentBlock, offset: offset, byteCount: length))
    }

    private var deltaHeadBytes: Int { carriesDigests ? 11 : 3 }

    private mutating func batch(
        _ sameBlock: Bool, _ offset: UInt64, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Step {
        guard allowsPageBatches else { throw error(.batchNotAgreed) }
        guard offset == 0 else { throw error(.batchOffset(offset)) }
        guard let body = try block(sameBlock, offset, &buffer), buffer.count >= body + 4 else { return .needMore }
        let name = blocks[currentBlock].name
        let count = buffer.be32(body)
        guard (1...UInt32(StreamLimit.batchRuns)).contains(count) else {
            throw error(.batchRuns(block: name, count))
        }
        let end = body + 4 + 12 * Int(count)
        guard buffer.count >= end else { return .needMore }
        var runs: [PageRun] = []
        runs.reserveCapacity(Int(count))
        var dataBytes: UInt64 = 0
        for index in stride(from: body + 4, to: end, by: 12) {
            let run = try run(buffer.be64(index), pages: buffer.be32(index + 8), block: name)
            if run.kind == .data { dataBytes += run.length }
            guard dataBytes <= StreamLimit.batchDataBytes else {
                throw error(.batchTooLong(block: name, byteCount: dataBytes))
            }
            runs.append(run)
        }
        let digestBytes = carriesDigests ? Int(dataBytes) / Wire.pageSize * 8 : 0
        guard buffer.count >= end + digestBytes else { return .needMore }
        if carriesDigests { digests = stride(from: end, to: end + digestBytes, by: 8).map { buffer.be64($0) } }
        advance(end + digestBytes, in: &buffer)
        payloadBytes = Int(dataBytes)
        return .item(.pageBatch(block: currentBlock, runs: runs))
    }

    private func run(_ word: UInt64, pages: UInt32, block: String) throws(StreamError) -> PageRun {
        let offset = word & ~RAMFlags.mask
        guard let kind = PageRunKind(rawValue: UInt8(truncatingIfNeeded: word)), kind != .invalid,
            word & RAMFlags.mask <= 0xff
        else { throw error(.batchRunKind(block: block, offset: offset, word & RAMFlags.mask)) }
        let run = PageRun(kind: kind, offset: offset, pages: pages)
        guard pages > 0 else { throw error(.batchRunEmpty(block: block, offset: offset)) }
        guard offset < currentLength, run.length <= currentLength - offset else {
            throw error(.batchRunOutside(block: block, offset: offset, pages: pages, length: currentLength))
        }
        return run
    }

    // MARK: The footer

    mutating func ramFooter(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 1 else { return .needMore }
        guard buffer[0] == SectionType.footer.rawValue else {
            throw error(.missingFooter(section: Wire.ramSectionName, got: buffer[0]))
        }
        guard buffer.count >= 5 else { return .needMore }
        guard buffer.be32(1) == sectionID else {
            throw error(.footerOfOther(section: Wire.ramSectionName, id: sectionID, got: buffer.be32(1)))
        }
        advance(5, in: &buffer)
        state = .betweenSections
        return .item(.ramSectionEnded(sectionType))
    }
}
