extension StreamWriter {
    /// A command of a source whose guest moves first. The package's bytes follow ``PostcopyCommand/packaged(byteCount:)``.
    mutating func command(_ command: PostcopyCommand) {
        switch command {
        case .advise(nil): head(CommandType.postcopyAdvise.rawValue, 0)
        case .advise(let advice?):
            head(CommandType.postcopyAdvise.rawValue, 16)
            be64(advice.blockPageSizes)
            be64(advice.targetPageSize)
        case .listen: head(CommandType.postcopyListen.rawValue, 0)
        case .run: head(CommandType.postcopyRun.rawValue, 0)
        case .discard(let discard):
            precondition(
                (1...StreamLimit.discardRanges).contains(discard.ranges.count), "StreamWriter: ranges of a discard")
            head(
                CommandType.postcopyRAMDiscard.rawValue,
                UInt16(3 + discard.block.utf8.count + 16 * discard.ranges.count))
            append([0])
            name(discard.block)
            append([0])
            for range in discard.ranges {
                be64(range.offset)
                be64(range.length)
            }
        case .packaged(let byteCount):
            precondition((1...UInt32(StreamLimit.packageBytes)).contains(byteCount), "StreamWriter: size of a package")
            head(CommandType.packaged.rawValue, 4)
            be32(byteCount)
        case .resume: head(CommandType.postcopyResume.rawValue, 0)
        case .receiveBitmap(let block):
            head(CommandType.receiveBitmap.rawValue, UInt16(1 + block.utf8.count))
            name(block)
        }
    }

    /// A message of a destination that runs the guest. The bitmap's bytes follow ``PostcopyMessage/receivedBitmap(block:byteCount:)``, and
    /// ``PostcopyMessage/bitmapEnded(block:)`` follows these.
    mutating func message(_ message: PostcopyMessage) {
        switch message {
        case .requestPages(let request):
            head(ReturnPathType.requestPagesWithName.rawValue, UInt16(13 + request.block.utf8.count))
            be64(request.offset)
            be32(request.length)
            name(request.block)
        case .receivedBitmap(let block, let byteCount):
            head(ReturnPathType.receivedBitmap.rawValue, UInt16(1 + block.utf8.count))
            name(block)
            be64(byteCount)
        case .bitmapEnded: be64(ReceivedBitmap.endMark)
        case .resumeAcknowledged:
            head(ReturnPathType.resumeAcknowledged.rawValue, 4)
            be32(ReturnPathDecoder.resumeValue)
        }
    }
}
